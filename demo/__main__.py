"""`python -m demo key=value …`"""

import click

from configs.cli import add_command
from demo.settings import DemoSettings
from pipeline.settings import DoctorSettings


@click.group()
def main() -> None:
    """The whole way in minutes."""


add_command(main, "demo", DemoSettings, "demo.json", "demo.run:run")
add_command(main, "doctor", DoctorSettings, "doctor.json", "demo.doctor:doctor")

if __name__ == "__main__":
    main(prog_name="just")
