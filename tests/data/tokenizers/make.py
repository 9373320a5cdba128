"""Make the small tokenizers: `python tests/data/tokenizers/make.py` (needs the extra `test`).

* `byte_level/`: `tokenizer.json`, byte-level BPE that splits like GPT-2 and puts `<s>` in front;
  `tokenizer_config.json` with a chat template; `golden.json`.
* `sentencepiece/`: `tokenizer.model`, Llama-like BPE with byte fallback and split digits;
  `tokenizer_config.json` that asks for `<s>` in front, and no `</s>` behind; `golden.json`.

`golden.json` is a list of `{"text", "tokens", "decoded"}`: `tokens` as the library that trained the tokenizer
encodes the text, `<s>` included; `decoded` is its decoding without the special tokens.
"""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent

CORPUS = """\
def fibonacci(n):
    if n < 2:
        return n
    return fibonacci(n - 1) + fibonacci(n - 2)

class Stack:
    def __init__(self, items=()):
        self.items = list(items)

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()

The quick brown fox jumps over the lazy dog, and the dog sleeps on.
A model reads tokens and writes tokens; the tokenizer stands between them and the text.
for index in range(10): print(index, index ** 2, "squared")
"""

TEXTS = [
    "def fibonacci(n):",
    "The quick brown fox",
    "  two spaces, a tab\tand\n\nblank lines\n",
    "naïve café — 東京 🙂 e\u0301",
    "price: 1234567890",
    "a<s>b</s>",
    " ",
    "",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def byte_level() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", *ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    folder = HERE / "byte_level"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)
    golden = []
    for text in TEXTS:
        tokens = tokenizer.encode(text).ids
        golden.append({"text": text, "tokens": tokens, "decoded": tokenizer.decode(tokens)})
    write_json(folder / "golden.json", golden)


def sentence_piece() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    folder = HERE / "sentencepiece"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": True, "special": True},
        "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": True, "special": True},
        "unk_token": {"__type": "AddedToken", "content": "<unk>", "normalized": True, "special": True},
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    golden = []
    for text in TEXTS:
        tokens = processor.encode(text, add_bos=True)
        golden.append({"text": text, "tokens": tokens, "decoded": processor.decode(tokens)})
    write_json(folder / "golden.json", golden)


if __name__ == "__main__":
    byte_level()
    sentence_piece()
