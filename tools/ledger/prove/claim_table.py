"""The claims of folders of a track in one table: of records, of races, and of folders of the challenge.

`record verify` proves and prints them in this order.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ledger.prove import challenge_claims as challenge
from ledger.prove import race_claims as race
from ledger.prove import record_claims as record
from ledger.prove.challenge_claims import never_checkable
from ledger.prove.claims import Claim, Finding, prove


class Row(NamedTuple):
    """A claim, and what proves it in each kind of folder; None: such a folder does not make it."""

    name: str
    record: Claim | None = None
    race: Claim | None = None
    challenge: Claim | None = None


# A race makes no artifact and has no time limit, so claims about these are not among its own.
NO_HASHES = never_checkable("this form has no hashes of the artifacts")
NOT_IMPORTED = never_checkable("a foreign script is not imported or run")
NO_PARENT = never_checkable("parents of this form are pull requests, not folders")
CLAIMS = (
    Row("schema", record.claim_schema, record.claim_schema, challenge.claim_schema),
    Row("name", record.claim_name, record.claim_name, challenge.claim_name),
    Row("files", record.claim_files, record.claim_files, challenge.claim_files),
    Row("logs", record.claim_logs, record.claim_logs, challenge.claim_logs),
    Row("source", record.claim_source, record.claim_source, challenge.claim_source),
    Row("numbers", record.claim_numbers, record.claim_numbers, challenge.claim_numbers),
    Row("config", record.claim_config, record.claim_config, challenge.claim_config),
    Row("seeds", record.claim_seeds, record.claim_seeds, challenge.claim_seeds),
    Row("bytes", record.claim_bytes, None, challenge.claim_bytes),
    Row("artifacts", record.claim_artifacts, None, NO_HASHES),
    Row("code", record.claim_code, None, challenge.claim_code),
    Row("import", record.claim_import, record.claim_import, NOT_IMPORTED),
    Row("syntax", record.claim_syntax, record.claim_syntax, challenge.claim_syntax),
    Row("clock", record.claim_clock, None, challenge.claim_clock),
    Row("steps", record.claim_steps, record.claim_steps, challenge.claim_steps),
    Row("score", record.claim_score, None, challenge.claim_score),
    Row("ratio", record.claim_ratio, record.claim_ratio, challenge.claim_ratio),
    Row("hardware", record.claim_hardware, record.claim_hardware, challenge.claim_hardware),
    Row("requirements", record.claim_requirements, record.claim_requirements, challenge.claim_requirements),
    Row("readme", record.claim_readme, record.claim_readme, challenge.claim_readme),
    Row("parent", record.claim_parent, record.claim_parent, NO_PARENT),
    Row("race", race=race.claim_race),
    Row("validation", race=race.claim_last_validation),
    Row("significance", race=race.claim_significance),
    Row("times", race=race.claim_times),
)
RECORD_CLAIMS = {row.name: row.record for row in CLAIMS if row.record}
RACE_CLAIMS = {row.name: row.race for row in CLAIMS if row.race}
CHALLENGE_CLAIMS = {row.name: row.challenge for row in CLAIMS if row.challenge}


def examine_record(folder: Path, records: Path) -> list[Finding]:
    """Return a finding for every claim about a record folder; `records` is where parents are looked up."""
    return prove(record.RecordCase(folder, records), RECORD_CLAIMS)


def examine_race(folder: Path, records: Path) -> list[Finding]:
    """Return a finding for every claim about a race's folder; `records` is where parents are looked up."""
    return prove(record.RecordCase(folder, records), RACE_CLAIMS)


def examine_challenge_folder(folder: Path) -> list[Finding]:
    """Return a finding for every claim about a folder of the published form."""
    findings = prove(challenge.ChallengeCase(folder), CHALLENGE_CLAIMS)
    return [finding._replace(evidence=challenge.printable(finding.evidence)) for finding in findings]
