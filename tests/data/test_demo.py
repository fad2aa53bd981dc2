from typing import Any

import pytest
import torch

from quickmerge.data import demo_document, demo_question


def prompt_of(tokenizer: Any) -> Any:
    demo = demo_question()
    message = demo["layout"].format(document=demo_document(), question=demo["question"])
    chat = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def test_the_document_is_long_and_its_middle_holds_the_answer(smollm2: tuple[Any, Any]) -> None:
    document, answer = demo_document(), demo_question()["answer"]
    encoded = smollm2[1](document, return_offsets_mapping=True)
    tokens = len(encoded["input_ids"])
    assert 3000 <= tokens <= 3600
    before = sum(start < document.index(answer) for start, _ in encoded["offset_mapping"])
    assert 0.3 < before / tokens < 0.7
    assert answer not in demo_question()["question"]


@pytest.mark.slow
def test_the_model_answers_from_the_whole_document(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    prompt = prompt_of(tokenizer)
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    assert demo_question()["answer"] in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
