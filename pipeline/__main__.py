"""`python -m pipeline COMMAND key=value …`"""

import click

from configs.cli import add_command
from pipeline import settings


@click.group()
def main() -> None:
    """Recordings → shards."""


add_command(main, "pack-parquet", settings.PackParquetSettings, "pack_parquet.json", "pipeline.pack:pack_parquet")
add_command(main, "shard-codes", settings.CodesSettings, "shard_codes.json", "pipeline.codes:shard_codes")
add_command(main, "shard-targets", settings.TargetsSettings, "shard_targets.json", "pipeline.targets:shard_targets")
add_command(main, "calibrate", settings.CalibrateSettings, "shard_targets.json", "pipeline.calibrate:calibrate")
add_command(main, "workflow", settings.WorkflowSettings, "workflow.json", "pipeline.workflow:workflow")
add_command(main, "inspect", settings.InspectSettings, "inspect.json", "pipeline.inspect:inspect")
add_command(main, "verify", settings.VerifySettings, "verify.json", "pipeline.verify:verify")
add_command(main, "prefetch", settings.PrefetchSettings, "prefetch.json", "pipeline.prefetch:prefetch")
add_command(main, "push-shards", settings.PushShardsSettings, "push_shards.json", "pipeline.push:push_shards")

if __name__ == "__main__":
    main(prog_name="just")
