"""Vision-language models of LLaVA's kind: image tokens are tokens to a cache."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from broadsheet.core.microworld.tokenizer import train_tokenizer
from broadsheet.core.models import load
from broadsheet.methods.caches.elastic_cache import ElasticCache
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.kivi import KIVI

IMAGE, PATCHES = 99, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved random LLaVA: 16 patches an image."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llava")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    LlavaForConditionalGeneration(config).save_pretrained(path)
    train_tokenizer().save_pretrained(path)
    return str(path)


def answer(model, image, cache=None):
    ids = torch.tensor([[1, 5] + [IMAGE] * PATCHES + [7, 8, 9]])
    return model.generate(input_ids=ids, pixel_values=image, max_new_tokens=8, do_sample=False, past_key_values=cache)


def test_load_and_image_prompts(folder):
    model, _ = load(folder)
    assert isinstance(model, LlavaForConditionalGeneration)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    stock = answer(model, image)
    for method in (Full(), KIVI(), ElasticCache(budget=1.0)):
        assert torch.equal(answer(model, image, method.cache(model)), stock)
    cache = ElasticCache(budget=0.5).cache(model)
    answer(model, image, cache)
    assert cache.seen == 2 + PATCHES + 3 + 7
    assert all(stored <= 0.5 * cache.seen + 1 for stored in cache.report()["stored"])


def test_merging_sees_the_image(folder):
    """Other pixels, other slots."""
    model, _ = load(folder)
    slots = []
    for seed in (1, 2):
        cache = ElasticCache(budget=0.5).cache(model)
        answer(model, torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed)), cache)
        slots.append(cache.layers[0].slots().values)
    assert not torch.equal(*slots)
