"""Imports the libraries of a script, then the script, and prints what the script's import did, as JSON.

    python import_probe.py FOLDER SCRIPT LIBRARY...

FOLDER holds train_gpt.py, whose real path is SCRIPT. The object that is printed has two lists: `effects` on
files, processes, the network or torch's state, and `reads` of environment variables.
"""

import importlib
import json
import os
import sys

FOLDER, SCRIPT, *LIBRARIES = sys.argv[1:]
BRINGS_EFFECTS = ("socket", "subprocess", "urllib", "shutil", "ctypes")  # any event of these modules
EFFECTS = {f"os.{name}" for name in "mkdir remove rename putenv unsetenv system fork chdir".split()}
# Files whose frames lie between os.environ and the code that asks it.
PASSED_ON = (__file__, os.__file__, "<frozen os>")

effects = []
reads = []
watching = False


def watch(event, args):
    """Note an audit event of Python (sys.addaudithook) that is an effect. Python source may be read."""
    if not watching:
        return
    if event == "open":
        path, mode, flags = args
        writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        if not str(path).endswith((".py", ".pyc")):
            effects.append(f"opens {path!r} ({mode})")
        elif writes:
            effects.append(f"writes {path!r}")
    elif event.split(".")[0] in BRINGS_EFFECTS or event in EFFECTS:
        effects.append(f"{event} {args!r}"[:200])


def called_by_script():
    """Return whether the script itself uses os.environ, not a library that it calls."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename in PASSED_ON or "_collections_abc" in frame.f_code.co_filename:
        frame = frame.f_back
    return os.path.realpath(frame.f_code.co_filename) == SCRIPT


class WatchedEnviron(type(os.environ)):
    """os.environ, which notes what the script reads and sets."""

    def __init__(self, real):
        self.__dict__.update(real.__dict__)

    def __getitem__(self, key):
        if called_by_script():
            reads.append(str(key))
        return super().__getitem__(key)

    def __iter__(self):
        if called_by_script():
            reads.append("all of it")
        return super().__iter__()

    def __setitem__(self, key, value):
        if called_by_script():
            effects.append(f"sets {key} in the environment")
        super().__setitem__(key, value)


for library in LIBRARIES:
    try:
        importlib.import_module(library)
    except ImportError:
        continue  # the script does without it, too

import torch  # noqa: E402


def state():
    """Return what an import must leave as it is."""
    return dict(
        rng=torch.get_rng_state().tolist(),
        dtype=str(torch.get_default_dtype()),
        argv=list(sys.argv),
        precision=torch.get_float32_matmul_precision(),
        threads=torch.get_num_threads(),
        grad=torch.is_grad_enabled(),
        cwd=os.getcwd(),
        tf32=torch.backends.cudnn.allow_tf32,
    )


os.environ = WatchedEnviron(os.environ)  # noqa: B003 - it is the same environment
sys.path.insert(0, FOLDER)
before = state()
sys.addaudithook(watch)

watching = True
import train_gpt  # noqa: E402, F401

watching = False

after = state()
effects += [f"changes {name}" for name in before if after[name] != before[name]]
if torch.cuda.is_initialized():
    effects.append("starts CUDA")
if torch.distributed.is_initialized():
    effects.append("joins a process group")
print(json.dumps(dict(effects=effects, reads=reads)))
