"""The tiny LLaVA of `toy_captures`, plain and adapted, and rows for it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from toy_captures import make_prompts, make_rows, tiny_llava


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture(scope="module")
def rows():
    return make_rows(make_prompts())


@pytest.fixture
def adapted():
    model = get_peft_model(tiny_llava(), LoraConfig(r=2, target_modules=r".*language_model.*\.k_proj"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()
