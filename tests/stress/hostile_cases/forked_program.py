"""Python that has imported torch and becomes a program again and again, which spares each that and compiling.

    python forked_program.py

Reads a JSON line for each program: cwd, env, argv (its file first), stdout and stderr (files). Forks; the
child becomes that program, in a session of its own. Writes the child's process id and, when it has ended, its
exit status, as subprocess has it.
"""

import gc
import json
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy.random  # noqa: F401
import sentencepiece  # noqa: F401
import torch  # noqa: F401
import triton  # noqa: F401


@cache
def code_of(file, changed):
    """Return the code of a program. changed: when the file was, in ns."""
    return compile(Path(file).read_bytes(), file, "exec", dont_inherit=True)


def next_program():
    """Start the programs that are asked for. Returns only in a child: what it is to become, and its code."""
    for line in sys.stdin:
        program = json.loads(line)
        file = Path(program["cwd"], program["argv"][0])
        code = code_of(str(file), file.stat().st_mtime_ns)
        child = os.fork()
        if child == 0:
            return program, code
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


def become(code):
    """Run a program as Python would that had been started with it."""
    main = ModuleType("__main__")
    main.__file__ = str(Path(sys.argv[0]).absolute())
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # else a child's last collection would touch, and so copy, all that was imported: 0.5 s
    program, code = next_program()
    take_place(program)
    become(code)
