"""Conversations: history, its reuse by the engine, a full context, interrupted answers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bardling.config import ModelConfig
from bardling.data.tokens.chat_template import ChatTemplate
from bardling.data.tokens.tokenizer import Tokenizer, load_tokenizer
from bardling.errors import UserError
from bardling.generation.conversation import Conversation
from bardling.generation.engine import Engine
from bardling.generation.requests import Request
from bardling.generation.sampling import Sampling
from bardling.model.gpt import GPT
from chat_models import write_chat_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_chat_tokenizer(tmp_path, "chatml", eos="<|im_end|>")
    return load_tokenizer(tmp_path)


@pytest.fixture
def template(tokenizer: Tokenizer) -> Any:
    with ChatTemplate(tokenizer.interface) as template:
        yield template


def model_of(tokenizer: Tokenizer, block_size: int) -> GPT:
    """A model with clear preferences, which generates letters only: they are one token each."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=block_size, vocab_size=tokenizer.vocab_size, tied=False)
    model = GPT(config, seed=3)
    letters = [index for index in range(tokenizer.vocab_size) if tokenizer.decode([index]) in "abcdefghijklmnopqrstuvwxyz"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 8
        others = torch.ones(model.head_weight.size(0), dtype=torch.bool)
        others[letters] = False
        model.head_weight[others] = 0
    return model.eval()


def talk(conversation: Conversation, text: str) -> str:
    return "".join(conversation.answer(conversation.prompt(text)))


def sampling(count: int, **settings: Any) -> Sampling:
    return Sampling(count, temperature=0.0, **settings)


def test_each_answer_continues_the_whole_conversation(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    model = model_of(tokenizer, 512)
    conversation = Conversation(Engine(model, tokenizer), tokenizer, template, sampling(10), 512)
    conversation.system = "Rhyme."
    first, second = talk(conversation, "one"), talk(conversation, "two")
    assert conversation.finish == "length"
    messages = [
        {"role": "system", "content": "Rhyme."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": second},
    ]
    assert conversation.content() == {"messages": messages}
    ids = tuple(tokenizer.encode(template.render(messages[:4]), allow_special=True).tolist())
    engine = Engine(model, tokenizer)
    engine.submit(Request(ids, sampling(10)))
    assert second == "".join(output.text for _ in range(10) for output in engine.step())
    conversation.reset()
    assert conversation.content() == {"messages": messages[:1]}
    assert talk(conversation, "one") == first


def test_a_turn_costs_its_own_tokens(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """What the engine has computed for the earlier turns is not computed again."""
    model = model_of(tokenizer, 1024)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    conversation = Conversation(Engine(model, tokenizer, slots=1, retained=1), tokenizer, template, sampling(20), 1024)
    talk(conversation, "x" * 300)
    assert sum(seen) > 300
    for _ in range(3):
        seen.clear()
        before = conversation.prompt("y").ids
        talk(conversation, "y")
        assert len(before) > 300
        assert sum(seen) < 100


def test_without_a_template_a_text_is_continued(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer, 512)
    conversation = Conversation(Engine(model, tokenizer), tokenizer, None, sampling(8), 512)
    first, second = talk(conversation, "Once "), talk(conversation, "Then ")
    assert conversation.content() == {"text": f"Once {first}\nThen {second}\n"}
    prompt = conversation.prompt("End")
    assert tokenizer.decode(prompt.ids).startswith(f"<s>Once {first}\nThen {second}\nEnd")


def test_the_oldest_turns_are_dropped_when_the_context_is_full(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    model = model_of(tokenizer, 256)
    conversation = Conversation(Engine(model, tokenizer), tokenizer, template, sampling(1000), 256)
    conversation.system = "S"
    dropped = []
    for number in range(4):
        prompt = conversation.prompt(f"{number}" * 60)
        dropped.append(prompt.dropped)
        assert len(prompt.ids) <= 256 - 64, "a quarter is left for the answer"
        answer = "".join(conversation.answer(prompt))
        assert len(prompt.ids) + len(answer) == 257
        assert conversation.finish == "context"
        assert conversation.turns[-1] == (prompt.text, answer)
        text = template.render(conversation.content()["messages"])
        assert text.startswith("<|im_start|>system\nS<|im_end|>"), "the system message stays"
    assert dropped == [0, 1, 1, 1]


def test_a_text_that_cannot_fit_leaves_the_conversation_as_it_is(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    conversation = Conversation(Engine(model_of(tokenizer, 256), tokenizer), tokenizer, template, sampling(5), 256)
    talk(conversation, "one")
    before = conversation.content()
    with pytest.raises(
        UserError, match=r"^the prompt has \d+ tokens without earlier turns; the model's context of 256 tokens "
    ):
        conversation.prompt("x" * 250)
    with pytest.raises(UserError, match=r"room for 251 and an answer: shorten the text$"):
        conversation.prompt("x" * 250)
    assert conversation.content() == before
    assert conversation.prompt("x").dropped == 0


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_went(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    engine = Engine(model_of(tokenizer, 256), tokenizer, slots=1)
    conversation = Conversation(engine, tokenizer, template, sampling(50), 256)
    asked = iter([False] * 3 + [True])
    answer = "".join(conversation.answer(conversation.prompt("hi"), lambda: next(asked)))
    assert len(answer) == 3
    assert conversation.finish is None
    assert conversation.turns == [("hi", answer)]
    assert engine.running == engine.waiting == 0
    pieces = conversation.answer(conversation.prompt("go on"))
    first = next(pieces)
    pieces.close()  # as an exception in the caller would
    assert conversation.turns[1:] == [("go on", first)]
    assert engine.running == 0


def test_answers_of_a_seed_repeat_and_differ_among_each_other(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    def answers(seed: int) -> list[str]:
        hot = Sampling(12, temperature=1.5, seed=seed)
        conversation = Conversation(Engine(model_of(tokenizer, 512), tokenizer), tokenizer, template, hot, 512)
        made = []
        for _ in range(3):
            made.append(talk(conversation, "hi"))
            conversation.reset()
        return made

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)
    assert len(set(answers(1))) == 3
