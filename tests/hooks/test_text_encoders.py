"""Text encoders compute every different prompt once: real ones, of the embedded pipelines."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from lesa import testbed
from lesa.hooks.text_encoders import encode_once


def clip():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    return CLIPTextModelWithProjection(
        CLIPTextConfig(**sizes, vocab_size=50, num_attention_heads=2, projection_dim=4)
    )


def t5():
    return T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


class Pipe:
    """As far as `encode_once` looks at one."""

    def __init__(self, encoder):
        self.config = {
            "text_encoder": ("transformers", type(encoder).__name__),
            "text_encoder_2": None,
        }
        self.text_encoder, self.text_encoder_2 = encoder, None


@pytest.mark.parametrize("make", [clip, t5])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_the_same_is_returned_from_fewer_rows(make, rows):
    torch.manual_seed(0)
    encoder, seen = make().eval(), []
    tokens = torch.tensor([[3, 1, 2], [4, 5, 6], [3, 1, 2], [7, 8, 9], [4, 5, 6], [3, 1, 2]])
    mask = torch.ones_like(tokens)
    embed = encoder.encoder.embed_tokens if make is t5 else encoder.get_input_embeddings()
    embed.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with torch.no_grad():
        wanted = encoder(tokens, attention_mask=mask, output_hidden_states=True)
        seen.clear()
        with encode_once(Pipe(encoder), rows):
            found = encoder(tokens, attention_mask=mask, output_hidden_states=True)
    assert sum(seen) == 3 and max(seen) <= rows
    assert type(found) is type(wanted) and found.keys() == wanted.keys()
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states)
    assert "forward" not in vars(encoder)


def test_a_mask_that_differs_is_another_row_and_pictures_are_not_touched():
    encoder, seen = clip().eval(), []
    encoder.register_forward_hook(lambda *_: seen.append(1))
    tokens, mask = torch.tensor([[3, 1, 2]] * 2), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with torch.no_grad(), encode_once(Pipe(encoder), 8):
        found = encoder(tokens, attention_mask=mask).last_hidden_state
        assert not torch.equal(found[0], found[1])

    class Vision(torch.nn.Module):
        def forward(self, pixels):
            return pixels.sum().expand(2)

    vision, pixels = Vision(), torch.ones(2, 3)
    with encode_once(Pipe(vision), 1):
        assert torch.equal(vision(pixels), torch.tensor([6.0, 6.0]))


def test_lengths_are_rows_too():
    """A number for each prompt, as some encoders take beside its tokens."""
    seen = []

    class Counted(torch.nn.Module):
        def forward(self, tokens, lengths):
            seen.append(len(tokens))
            return tokens.cumsum(1) * lengths[:, None]

    encoder, tokens, lengths = Counted(), torch.tensor([[1, 2]] * 3), torch.tensor([2, 2, 1])
    wanted = encoder(tokens, lengths)
    seen.clear()
    with encode_once(Pipe(encoder), 8):
        assert torch.equal(encoder(tokens, lengths), wanted)
    assert seen == [2]


def test_what_offloading_put_there_stays():
    encoder, calls = clip().eval(), []
    plain = encoder.forward
    encoder.forward = moved = lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    with torch.no_grad(), encode_once(Pipe(encoder), 8):
        encoder(torch.tensor([[1, 2]] * 4))
    assert encoder.forward is moved and calls == [1]


@pytest.mark.parametrize("name", ["flux", "qwen", "hunyuan", "sdxl"])
def test_prompts_of_the_embedded_pipelines_are_encoded_once(name):
    pipe, seen = testbed.load(name), []
    encoders = [
        getattr(pipe, part) for part in ("text_encoder", "text_encoder_2") if hasattr(pipe, part)
    ]
    for encoder in filter(None, encoders):
        encoder.get_input_embeddings().register_forward_pre_hook(
            lambda _, args: seen.append(len(args[0]))
        )
    call = {**testbed.settings(name), "num_inference_steps": 1, "output_type": "latent"}
    texts = testbed.prompts(name, 2)

    def latents():
        noise = [torch.Generator().manual_seed(0) for _ in range(6)]
        return pipe(prompt=texts * 3, generator=noise, return_dict=False, **call)[0]

    with torch.no_grad():
        wanted = latents()
        before, _ = sum(seen), seen.clear()
        with encode_once(pipe, 8):
            found = latents()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert sum(seen) * 2 <= before
