from tokun.cli.command import main
from tokun.utils import console

console.run("tokun", main)
