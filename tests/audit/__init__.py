"""Tests of the auditor: it passes an honest run and fails each planted fault."""
