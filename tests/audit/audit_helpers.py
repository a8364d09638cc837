"""The auditor in this process: the child in which the trainer's command runs it imports torch each time."""

from functools import cache
from unittest import mock

import audit
import train_gpt as t

load_once = cache(audit.load_audited)


def main_here(argv):
    """Run a command of the trainer, `audit` without a child. Returns the exit status."""
    if argv[0] != "audit":
        return t.main(argv)
    with mock.patch.object(audit, "load_audited", load_once):
        return audit.main([*argv[1:], "--script", t.__file__])
