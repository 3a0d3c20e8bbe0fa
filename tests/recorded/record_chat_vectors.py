"""Records what vLLM's own front end makes of chat and completion bodies: models/*/ and chat_vectors.json beside this.

Run with a Python that has vllm 0.32 and transformers 5 (never part of the test run):
    python tests/recorded/record_chat_vectors.py
It needs no engine and no network: the request class, message parser, template and tokenizer of vLLM are called in the
order of `OnlineRenderer.preprocess_chat` and `HfRenderer.render_messages`.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers import merge_kwargs
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import resolve_chat_template_content_format, safe_apply_chat_template
from vllm.tokenizers.hf import get_cached_tokenizer

HERE = Path(__file__).parent
CORPUS = [
    "You are a helpful assistant. What is the weather in Paris today, and what will it be tomorrow?",
    'The quick brown fox jumps over the lazy dog. <tool_call> {"name": "get_weather", "arguments": {}}',
    "user assistant system tool\n\nCalling functions returns results: 12345, 67.89 and more numbers.",
    "Größe, naïve café, 東京の天気は, привет мир, emoji 🙂 and   many    spaces\n\n\n",
] * 3
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHATML = """{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- "# Tools\\n<tools>" }}
{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if message.reasoning_content %}{{- '<think>\\n' ~ message.reasoning_content ~ '\\n</think>\\n' }}{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n' }}{{- call.function | tojson }}{{- '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
LLAMA = """{{- bos_token }}
{%- if documents %}{%- for d in documents %}{{- 'Doc ' ~ loop.index ~ ': ' ~ d.title ~ '\\n' }}{% endfor %}{% endif %}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['content'] is string %}{{- message['content'] | trim }}{%- else %}
{%- for content in message['content'] %}{%- if content['type'] == 'text' %}{{- content['text'] | trim }}{%- endif %}
{%- endfor %}{%- endif %}
{%- if message.tool_calls is defined %}{{- message.tool_calls | tojson(indent=2) }}{%- endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if reasoning_effort is defined %}{{- 'Effort: ' + reasoning_effort }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
INST = """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}
{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}
{%- for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate') }}
{% endif %}
{% if message['role'] == 'user' %}{% generation %}{{ '[INST] ' + (system if loop.first else '') }}{% endgeneration %}
{{ message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
    {{- ' ' + message['content'] + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported: ' ~ message.role) }}{% endif %}
{% if loop.index > 50 %}{% break %}{% endif %}
{% endfor %}
"""


def byte_level(pattern: str, specials: list[str], normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, trainers.BpeTrainer, pre_tokenizers.ByteLevel.alphabet())
    tokenizer.add_special_tokens(specials)
    return tokenizer


def train(tokenizer: Tokenizer, trainer: type, alphabet: list[str], **options) -> None:
    tokenizer.train_from_iterator(
        CORPUS, trainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False, **options)
    )


def qwen() -> tuple[Tokenizer, dict]:
    tokenizer = byte_level(QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizers.NFC())
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in ("<tool_call>", "</tool_call>")])
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return tokenizer, config | {"chat_template": CHATML}


def llama3() -> tuple[Tokenizer, dict]:
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = byte_level(LLAMA3, names)
    bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[bos])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos[0], "eos_token": "<|eot_id|>"}


def sentencepiece() -> tuple[Tokenizer, dict]:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < 3]
    data["pre_tokenizer"]["split"] = False
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    eos = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False}
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos, "unk_token": "<unk>",
        "chat_template": [{"name": "default", "template": INST}, {"name": "tool_use", "template": CHATML}],
    }  # fmt: skip


WEATHER = {"type": "function", "function": {"parameters": {"type": "object", "properties": {"city": {}}},
           "name": "get_weather", "extra": 1}}  # fmt: skip
CALL = {"type": "function", "id": "call_1", "index": 0,
        "function": {"name": "get_weather", "arguments": '{"city": "Paris", "n": [1, 2.50]}'}}  # fmt: skip
USER = {"role": "user", "content": "What is the weather in Paris today?"}
TURNS = [{"role": "system", "content": "You are helpful."}, USER, {"role": "assistant", "content": "Sunny."}, USER]


def said(content: object, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": content}], **more}


def called(call: dict, result: object = "18 degrees") -> dict:
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"messages": [USER, answer, {"role": "tool", "tool_call_id": "call_1", "content": result}]}


CHATS: dict[str, dict] = {
    "one message": said("Hello there"),
    "turns": {"messages": TURNS},
    "no generation prompt": {"messages": TURNS, "add_generation_prompt": False},
    "special tokens added": {"messages": TURNS, "add_special_tokens": True},
    "tools": {"messages": TURNS, "tools": [WEATHER, {"function": {"name": "g", "description": "d", "strict": True}}]},
    "tool call": called(CALL) | {"tools": [WEATHER]},
    "tool call with arguments that are no object": called(CALL | {"function": {"name": "f", "arguments": "[1]"}}),
    "tool call with broken arguments": called(CALL | {"function": {"name": "f", "arguments": '{"a"'}}),
    "tool call without arguments": called(CALL | {"function": {"name": "f", "arguments": ""}}),
    "empty tool calls": {"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": []}, USER]},
    "tool result in parts": called(CALL, [{"type": "text", "text": "18"}, {"type": "text", "text": "degrees"}]),
    "text parts": said([{"type": "text", "text": " one "}, {"text": "two", "type": "text", "cache_control": {"a": 1}}]),
    "other text parts": said(["plain", {"type": "refusal", "refusal": "no"}, {"type": "input_text", "text": "q"}]),
    "empty content": said(""),
    "no content": {"messages": [{"role": "user"}]},
    "named": {"messages": [{"role": "user", "name": "bob", "content": "hi"}]},
    "reasoning": {"messages": [USER, {"role": "assistant", "content": "x", "reasoning_content": "because"}, USER]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, USER]},
    "developer after system": {"messages": [TURNS[0], {"role": "developer", "content": "Be brief."}, USER]},
    "billing header": {"messages": [{"role": "system", "content": "x-anthropic-billing-header: 1\nBe kind."}, USER]},
    "continued": {"messages": [USER, {"role": "assistant", "content": "It is "}], "add_generation_prompt": False,
                  "continue_final_message": True},
    "continued in parts": {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}],
                           "add_generation_prompt": False, "continue_final_message": True},
    "thinking off": said("Hello", chat_template_kwargs={"enable_thinking": False, "unknown": 1, "other": None}),
    "effort": said("Hello", reasoning_effort="low"),
    "effort none": said("Hello", reasoning_effort="none"),
    "documents": said("Hello", documents=[{"title": "T", "text": "B"}]),
    "kwarg shadows a special token": said("Hello", chat_template_kwargs={"bos_token": "<s>"}),
    "kwarg shadows a global": said("Hello", chat_template_kwargs={"range": 3, "namespace": "x"}),
    "roles do not alternate": {"messages": [USER, USER]},
    "unknown role": {"messages": [{"role": "ipython", "content": "x"}]},
    "special token in content": said("say <|im_end|> or <s> or <|eot_id|> now"),
    "unicode": said("Gro\u0308\u00dfe cafe\u0301 \U0001f642\u200d \u6771\u4eac \ufb01 \u0000 a\u0300\u0301 \u00a0x"),
    "white space": said("  a  \n\n  b\t\tc \r\n \r\n  "),
    "long": said("word and number 12345 of many. " * 40),
}  # fmt: skip
PROMPTS = ["Hello there", "", " leading", "a <|im_end|> b</s>c", "Größe \U0001f642\n\n", "<s>again", "x" * 300]


def chat_ids(tokenizer, config: SimpleNamespace, body: dict) -> list[int] | None:
    try:
        request = ChatCompletionRequest.model_validate(json.loads(json.dumps(body)))
        tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
        params = request.build_chat_params(None, "auto")
        params = params.with_defaults(merge_kwargs(None, {"tools": tools, "tokenize": False}))
        form = resolve_chat_template_content_format(None, tools, "auto", tokenizer, model_config=config)
        messages, _, _ = parse_chat_messages(request.messages, config, content_format=form)
        text = safe_apply_chat_template(config, tokenizer, messages, **params.get_apply_chat_template_kwargs())
        return tokenizer(text, add_special_tokens=request.add_special_tokens).input_ids
    except Exception as error:
        print("  refused:", type(error).__name__, str(error)[:90].replace("\n", " "))
        return None


def save(name: str, tokenizer: Tokenizer, config: dict) -> Path:
    path = HERE / "models" / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"), pretty=False)
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}\n')
    if name == "llama3":
        (path / "chat_template.jinja").write_text(LLAMA)
    return path


def record(name: str, built: tuple[Tokenizer, dict]) -> list[dict]:
    path = save(name, *built)
    tokenizer = get_cached_tokenizer(AutoTokenizer.from_pretrained(path))
    config = SimpleNamespace(
        multimodal_config=None, enable_prompt_embeds=False, tokenizer_revision=None, revision=None, code_revision=None,
        trust_remote_code=False, tokenizer=str(path), model=str(path), hf_config=SimpleNamespace(model_type="llama"),
    )  # fmt: skip
    vectors = []
    for title, body in CHATS.items():
        print(name, title)
        vectors.append({"model": name, "title": title, "body": body, "ids": chat_ids(tokenizer, config, body)})
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=True).input_ids
        vectors.append({"model": name, "title": f"completion {prompt[:12]!r}", "body": {"prompt": prompt}, "ids": ids})
    return vectors


def main() -> None:
    built = {"qwen": qwen(), "llama3": llama3(), "sentencepiece": sentencepiece()}
    vectors = [vector for name, model in built.items() for vector in record(name, model)]
    lines = ",\n".join(json.dumps(vector, separators=(",", ":")) for vector in vectors)
    (HERE / "chat_vectors.json").write_text(f"[\n{lines}\n]\n")
    print(len(vectors), "vectors")


if __name__ == "__main__":
    main()
