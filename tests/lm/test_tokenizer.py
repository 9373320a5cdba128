"""Tokenizers of checkpoints, and the chat templates beside them."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tiny_models import TOKENIZERS

from jaxinf.lm import Tokenizer
from jaxinf.lm.chat import ChatTemplate
from pallas_kernels.errors import CheckpointError, InputError

KINDS = {"byte_level": "tokenizer.json", "sentencepiece": "tokenizer.model"}


@pytest.fixture(params=KINDS)
def folder(request, tmp_path: Path) -> Path:
    return Path(shutil.copytree(TOKENIZERS / request.param, tmp_path / request.param))


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def configure(folder: Path, **values) -> Tokenizer:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return load(folder)


def test_goldens(folder: Path) -> None:
    tokenizer = load(folder)
    for case in json.loads((folder / "golden.json").read_text(encoding="utf-8")):
        assert tokenizer.encode(case["text"]) == case["tokens"]
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["tokens"][1:]
        assert tokenizer.decode(case["tokens"]) == case["decoded"]
        assert max(case["tokens"]) < tokenizer.vocab_size


def test_special_tokens(folder: Path) -> None:
    tokenizer = load(folder)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert (bos, eos) == (tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>"))
    assert None not in (bos, eos)
    assert tokenizer.token_to_id("no such token") is None
    words = tokenizer.encode("the dog", add_special_tokens=False)
    assert tokenizer.decode([bos, *words, eos]) == "the dog"
    assert tokenizer.decode([bos, *words, eos], skip_special_tokens=False) == "<s>the dog</s>"
    chat = tokenizer.encode_chat("<s>the dog</s>")
    assert (chat[0], chat[-1]) == (bos, eos)
    assert tokenizer.decode(chat) == "the dog"


def test_sentencepiece_follows_the_rules_of_its_config(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TOKENIZERS / "sentencepiece", tmp_path / "x"))
    tokenizer = configure(folder, add_bos_token=False, add_eos_token=True)
    assert tokenizer.encode("dog")[0] != tokenizer.bos_id
    assert tokenizer.encode("dog")[-1] == tokenizer.eos_id
    assert tokenizer.eos_id not in tokenizer.encode("dog", add_special_tokens=False)


def test_sentencepiece_with_added_tokens(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TOKENIZERS / "sentencepiece", tmp_path / "x"))
    size = load(folder).vocab_size
    added = {
        str(size): {"content": "<|im_start|>", "special": True},
        str(size + 1): {"content": "<tool>", "special": False},
    }
    tokenizer = configure(folder, added_tokens_decoder=added)
    assert tokenizer.vocab_size == size + 2
    ids = tokenizer.encode("<|im_start|>dog<tool>fox", add_special_tokens=False)
    assert (ids[0], ids.count(size + 1)) == (size, 1)
    assert tokenizer.decode(ids) == "dog<tool>fox"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>dog<tool>fox"
    assert tokenizer.decode([size + 9]) == ""


def test_text_is_needed(folder: Path) -> None:
    with pytest.raises(InputError, match="int"):
        load(folder).encode(3)


def test_folders_without_or_with_broken_tokenizers(folder: Path, tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None
    path = folder / KINDS[folder.name]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=path.name):
        load(folder)
    shutil.copy(TOKENIZERS / folder.name / path.name, path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load(folder)


@pytest.mark.parametrize(
    "settings", [{"added_tokens_decoder": [1]}, {"added_tokens_decoder": {"x": "<a>"}}, {"chat_template": 5}]
)
def test_settings_of_another_form(folder: Path, settings: dict) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        configure(folder, **settings)


def test_without_sentencepiece_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r"jaxinf\[sentencepiece\]"):
        load(TOKENIZERS / "sentencepiece")
    assert sentencepiece.__version__


@pytest.mark.parametrize("place", ["string", "list", "jinja", "json"])
def test_where_a_chat_template_may_stand(place: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TOKENIZERS / "byte_level", tmp_path / "x"))
    source = "{{ messages[0].content }}"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": source}]
    in_config = {"string": source, "list": named, "jinja": "no", "json": None}[place]
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(source)
    if place == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    assert configure(folder, chat_template=in_config).chat_template == source


class TestTemplates:
    MESSAGES = ({"role": "user", "content": "hi  "}, {"role": "assistant", "content": "yo"})

    def render(self, source: str, **variables) -> str:
        return ChatTemplate(source, {"bos_token": "<s>"}).render(self.MESSAGES, **variables)

    def test_what_hugging_face_templates_use(self) -> None:
        source = """{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'skip' %}{% continue %}{% endif %}
    {{- '<' + m['role'] + '>' }}
    {%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}
    {%- if m.role == 'user' %}{{ m.content | trim }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}
{%- if tools is not none %}{{ tools | tojson }}{% endif %}
{%- if thinking is defined %}{{ thinking }}{% endif %}"""
        assert self.render(source) == "<s><user>hi<assistant>yo<assistant>"
        assert self.render(source, tools=[{"ä": 1}], thinking=3, add_generation_prompt=False).endswith(
            'yo[{"ä": 1}]3'
        )
        assert self.render("{{ strftime_now('%Y') }}").isdigit()

    def test_errors_are_sentences(self) -> None:
        with pytest.raises(InputError, match="roles must alternate"):
            self.render("{{ raise_exception('roles must alternate') }}")
        with pytest.raises(InputError, match="jinja2"):
            self.render("{% if %}")
        with pytest.raises(InputError, match="refuses"):
            self.render("{{ messages[0].content + 1 }}")

    def test_templates_reach_nothing_else(self) -> None:
        for source in (
            "{{ messages.__class__.__mro__ }}",
            "{{ messages.append(1) }}",
            "{{ ''.__class__.__mro__ }}",
        ):
            with pytest.raises(InputError):
                self.render(source)
