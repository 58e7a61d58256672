"""`python -m demo key=value …`"""

import click

from configs.cli import add_command
from demo.settings import DemoSettings


@click.group()
def main() -> None:
    """The whole way in minutes."""


add_command(main, "demo", DemoSettings, "demo.json", "demo.run:run")

if __name__ == "__main__":
    main(prog_name="just")
