"""Python that has imported torch and becomes a program again and again, which spares each the import.

    python forked_program.py

Reads a JSON line for each program: cwd, env, argv (its file first), stdout and stderr (files). Forks; the
child becomes that program, in a session of its own. Writes the child's process id and, when it has ended, its
exit status, as subprocess has it.
"""

import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

import numpy  # noqa: F401
import sentencepiece  # noqa: F401
import torch  # noqa: F401


def next_program():
    """Start the programs that are asked for. Returns only in a child: what it is to become."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def take_place(program):
    """Take the folder, environment, streams and arguments that the program would have been started with."""
    os.setsid()
    os.chdir(program["cwd"])
    os.environ.clear()
    os.environ.update(program["env"])
    tempfile.tempdir = None  # found anew, in that environment
    for number, file in ((0, os.devnull), (1, program["stdout"]), (2, program["stderr"])):
        os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), number)
    sys.argv = program["argv"]
    sys.path[0] = str(Path(sys.argv[0]).absolute().parent)


if __name__ == "__main__":
    take_place(next_program())
    runpy.run_path(str(Path(sys.argv[0]).absolute()), run_name="__main__")
