"""What is particular to SGLang in the bodies of its legs, in the room, and in what clients may not send."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.base import Leg
from adapters.headers import forwarded
from adapters.openai import COMPLETIONS, parse
from adapters.sglang import Sglang, rooms
from gateway.core.errors import BadRequest, ConfigError
from gateway.core.types import Engine, Role
from tests.adapters.transcripts import B, answered, broken, payload, said, token

RANKED = Engine("p", "http://p", Role.PREFILL, details={"dp_size": 4})


def sent(request, engine=B):
    (call,) = Sglang(rng=random.Random(1)).open(request, engine, engine).start()
    return msgspec.json.decode(call.body)


def test_one_engine_twice_is_one_leg_without_a_room():
    body = sent(payload(max_tokens=5))
    assert not [name for name in body if name.startswith("bootstrap")]
    assert body["max_tokens"] == 5


@pytest.mark.parametrize(
    ("happening", "ending"),
    [
        (token(), "commit"),
        (answered(Leg.DECODE, 200, b"{}"), "answer 200"),
        (answered(Leg.DECODE, 400), "answer 400"),
        (answered(Leg.DECODE, 503), "retry b"),
        (broken(Leg.DECODE), "retry b"),
        (broken(Leg.PREFILL), ""),
    ],
)
def test_a_single_leg_ends_as_its_engine_answers(happening, ending):
    run = Sglang().open(payload(), B, B)
    run.start()
    assert said(run.receive(happening)) == ending
    assert not (ending and run.receive(token()))


def test_engines_of_different_page_sizes_never_meet_for_the_decode_engine_would_die_of_it():
    prefill, decode = (
        Engine(name, f"http://{name}", Role.PREFILL, block_tokens=size) for name, size in (("p", 16), ("d", 1))
    )
    with pytest.raises(ConfigError, match="16 and 1 tokens"):
        Sglang().open(payload(), prefill, decode)


@pytest.mark.parametrize(("given_priority", "sent_priority"), [(3, -3), (-2, 2), (0, 0)])
def test_a_priority_changes_its_sign_for_here_higher_is_earlier(given_priority, sent_priority):
    assert sent(payload(priority=given_priority))["priority"] == sent_priority


def test_an_engine_told_to_serve_low_values_first_gets_the_priority_as_it_is():
    engine = replace(B, details={"schedule_low_priority_values_first": True})
    assert sent(payload(priority=3), engine)["priority"] == 3


def test_known_token_ids_spare_the_engine_its_tokenizer():
    request = replace(payload(), token_ids=np.array([5, 6], dtype=np.int32))
    assert sent(request)["input_ids"] == [5, 6]


def test_an_adapter_is_named_where_sglang_looks_for_it():
    assert sent(payload(model="sql"), replace(B, models=("m", "sql"), lora_names=("sql",)))["lora_path"] == "sql"
    assert "lora_path" not in sent(payload())


# ---- rooms ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**63 - 1), st.integers(1, 64), st.text(max_size=20))
def test_a_room_has_63_bits_and_lies_on_the_conversation_s_rank(bits, ranks, text):
    class Fixed(random.Random):
        def getrandbits(self, k: int, /) -> int:
            return bits

    request = payload(messages=[{"role": "user", "content": text}])
    room = rooms.draw(Fixed(), request, ranks)
    assert 0 <= room < 2**63
    assert ranks == 1 or room % ranks == rooms.conversation_rank(request, ranks)


def test_a_conversation_stays_on_its_rank_over_its_turns():
    system, first = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}
    later = [system, first, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Go on"}]
    one, two = (rooms.conversation_rank(payload(messages=turns), 8) for turns in ([system, first], later))
    assert one == two


def test_conversations_with_one_system_prompt_are_spread_over_the_ranks():
    def rank(number):
        talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Question {number}"}]
        return rooms.conversation_rank(payload(messages=talk), 4)

    counts = np.bincount([rank(number) for number in range(400)], minlength=4)
    assert counts.min() > 60


def test_a_completion_has_no_conversation_and_any_rank():
    request = parse(COMPLETIONS, b'{"model":"m","prompt":"a"}', request_id="r")
    assert rooms.conversation_rank(request, 4) is None


def test_the_number_of_ranks_is_what_the_engine_told():
    assert [rooms.rank_count(engine) for engine in (RANKED, B)] == [4, 1]


@pytest.mark.parametrize("prompt", [[5, 384], [[5], [384]], [384]])
def test_a_token_id_beyond_the_vocabulary_is_refused_for_the_scheduler_would_die_of_it(prompt):
    engine = replace(B, details={"vocabulary_tokens": 384})
    request = parse(COMPLETIONS, msgspec.json.encode({"model": "m", "prompt": prompt}), request_id="r")
    run = Sglang().open(request, engine, engine)
    (answer,) = run.start()
    assert answer.status == 400
    assert msgspec.json.decode(answer.body)["error"]["param"] == "prompt"
    assert run.receive(token()) == []


@pytest.mark.parametrize("prompt", [[5, 383], "text", ["a", "b"]])
def test_other_prompts_are_sent(prompt):
    engine = replace(B, details={"vocabulary_tokens": 384})
    request = parse(COMPLETIONS, msgspec.json.encode({"model": "m", "prompt": prompt}), request_id="r")
    assert sent(request, engine)["prompt"] == prompt


# ---- what clients may not send --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        *({"bootstrap_host": ["10.0.0.1"]}, {"bootstrap_port": [1]}, {"bootstrap_room": [1]}, {"bootstrap_room": 7}),
        *({"bootstrap_pair_key": "x"}, {"rid": ["a", "b"]}, {"rid": ""}, {"routed_dp_rank": 9}),
        *({"data_parallel_rank": -1}, {"disagg_prefill_dp_rank": [1]}, {"input_ids": [-5]}, {"decode_tp_size": 0}),
        *({"session_params": {"id": "x"}}, {"custom_logit_processor": "x"}, {"routing_key": "x"}),
        *({"mm_hashes": ["x"]}, {"mm_content_hashes": ["x"]}, {"input_embeds": [[0.5]]}),
    ],
    ids=str,
)
def test_a_field_that_reaches_into_the_scheduler_never_leaves_the_gateway(field):
    (name,) = field
    body = sent(payload(**field))
    assert body.get(name) != field[name]


def test_an_adapter_by_lora_path_is_refused_for_routing_would_not_see_it():
    with pytest.raises(BadRequest, match="lora_path"):
        parse("/v1/chat/completions", msgspec.json.encode(payload().body | {"lora_path": ["x"]}), request_id="r")


@pytest.mark.parametrize("name", ["X-Override-Bootstrap-Room", "x-override-rid", "X-Data-Parallel-Rank"])
def test_a_header_that_overrides_the_body_never_leaves_the_gateway(name):
    assert forwarded([(name, "1"), ("traceparent", "00")]) == (("traceparent", "00"),)
