"""Run `python -m applications.demo`."""

from applications.demo.data_set import main
from util.errors import run_script

run_script(main)
