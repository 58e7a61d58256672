"""`python -m trainer COMMAND key=value …`"""

import click

from configs.cli import add_command
from trainer import settings


@click.group()
def main() -> None:
    """Shards → a 48 kHz decoder."""


add_command(main, "train", settings.TrainSettings, "decoder_48khz.json", "trainer.loop:train")
add_command(main, "status", settings.StatusSettings, "status.json", "trainer.status:status")
add_command(main, "decode", settings.DecodeSettings, "decode.json", "trainer.decode:decode")
add_command(main, "export", settings.ExportSettings, "export.json", "trainer.export:export")
add_command(main, "export-onnx", settings.ExportOnnxSettings, "export_onnx.json", "trainer.export_onnx:export_onnx")
add_command(main, "web", settings.WebSettings, "web.json", "trainer.web:web")
add_command(main, "push", settings.PushSettings, "push.json", "trainer.push:push")
add_command(main, "eval", settings.EvalSettings, "eval.json", "trainer.evaluate:evaluate")
add_command(main, "report", settings.ReportSettings, "report.json", "trainer.report.command:report")

if __name__ == "__main__":
    main(prog_name="just")
