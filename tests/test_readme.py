"""README's commands are those that .ci/run runs, and what it links to exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def readme_commands() -> list[str]:
    return re.findall(r"^readme '(.+)'$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)


def test_readme_shows_the_commands_that_are_checked() -> None:
    readme = (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL))
    lines = {line.strip().removeprefix("$ ") for line in blocks.splitlines()}
    commands = readme_commands()
    assert len(commands) == 2
    assert [command for command in commands if command not in lines] == []


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
        assert [link for link in links if not (ROOT / link).exists()] == []
