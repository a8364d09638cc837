"""For the tests of the auditor: an honest run, made once, and a process group of one rank."""

from tests.audit.audit_cases import group, honest  # noqa: F401
