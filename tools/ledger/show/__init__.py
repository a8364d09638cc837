"""Shows and compares what was proved: boards, differences, tests of significance, reproductions."""
