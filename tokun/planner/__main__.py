from tokun.planner import main
from tokun.utils import console

console.run("tokun.planner", main)
