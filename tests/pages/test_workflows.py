"""The workflows run nothing that can change under them, with no more rights than they need."""

import re

import pytest

from tests.layout import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"[\w-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def test_there_are_workflows():
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "release.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_a_commit(path):
    # $/ is this repository, at this commit.
    used = re.findall(r"uses: (?!\$/)(.*)", path.read_text())
    assert used
    assert not [action for action in used if not PINNED.fullmatch(action)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_rights_are_given_job_by_job(path):
    text = path.read_text()
    assert "\npermissions: {}\n" in text
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    assert "secrets." not in text


def test_only_the_job_that_publishes_proves_who_it_is():
    jobs = [job for path in WORKFLOWS for job in re.split(r"\n  (?=\w+:\n)", path.read_text())]
    proving = [job for job in jobs if "id-token: write" in job]
    assert [job.partition(":")[0] for job in proving] == ["publish"]
    assert "environment: pypi" in proving[0]
