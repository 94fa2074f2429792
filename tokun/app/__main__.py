from tokun.app.page import main
from tokun.utils import console

console.run("tokun.app", main)
