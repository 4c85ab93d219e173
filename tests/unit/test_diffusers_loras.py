"""LoRAs of dense FLUX.1 on a FLUX-MoE in diffusers: the same images as on the dense model, and no trace when they go."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, load_transformer
from d2m_model.hosts.diffusers import loras as fused
from d2m_model.keys import diffusers_shapes
from tests.toys.pairs import DIMS, Pair, save_pair, velocity

RANK = 3
TARGETS = tuple(
    name.removesuffix(".weight")
    for name, shape in diffusers_shapes(DIMS).items()
    if name.endswith(".weight") and len(shape) == 2 and "blocks." in name
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("compressed"), rank=16)


def lora(seed: int = 0, targets: tuple[str, ...] = TARGETS, gain: float = 0.1) -> dict[str, Tensor]:
    """Return a LoRA of every linear layer of the blocks, as PEFT saves it."""
    generator = torch.Generator().manual_seed(seed)
    shapes, tensors = diffusers_shapes(DIMS), {}
    for target in targets:
        outputs, inputs_ = shapes[f"{target}.weight"]
        tensors[f"transformer.{target}.lora_A.weight"] = torch.randn(RANK, inputs_, generator=generator) * inputs_**-0.5
        tensors[f"transformer.{target}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) * gain
    return tensors


def dense_with(pair: Pair, *loras: tuple[dict[str, Tensor], float]) -> torch.nn.Module:
    """The dense model with the products of the LoRAs added to its weights, here and by hand."""
    model = load_transformer(pair.dense)
    with torch.no_grad():
        for tensors, scale in loras:
            for name, down in tensors.items():
                if name.endswith(".lora_A.weight"):
                    target = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
                    up = tensors[name.replace("lora_A", "lora_B")]
                    model.get_parameter(f"{target}.weight").add_(scale * (up @ down))
    return model


def pipeline(model: torch.nn.Module) -> FluxPipeline:
    """Without text encoders, as one that is given its prompt's embeddings."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=16, norm_num_groups=1, sample_size=16,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler, autoencoder, None, None, None, None, model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: FluxPipeline, **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    images: Tensor = pipe(
        prompt_embeds=torch.randn(1, 3, 32, generator=generator),
        pooled_prompt_embeds=torch.randn(1, 48, generator=generator),
        height=32,
        width=32,
        num_inference_steps=2,
        generator=generator,
        **({"output_type": "latent"} | more),
    ).images
    return images


@pytest.fixture
def model(pair: Pair) -> FluxMoETransformer2DModel:
    model = FluxMoETransformer2DModel.from_flux_moe(pair.moe)
    model.set_top_k(12)
    return model


@pytest.fixture
def bits(model: FluxMoETransformer2DModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: torch.nn.Module, bits: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == bits.keys() and all(torch.equal(now[name], tensor) for name, tensor in bits.items())


def test_a_pipeline_samples_an_image_as_with_the_dense_model(pair: Pair, model: FluxMoETransformer2DModel) -> None:
    dense = sample(pipeline(load_transformer(pair.dense)))
    torch.testing.assert_close(sample(pipeline(model)), dense, rtol=1e-4, atol=1e-5)
    image = sample(pipeline(model), output_type="np")
    assert image.shape == (1, 32, 32, 3)
    model.set_top_k(2)
    assert (sample(pipeline(model)) - dense).norm() > 0.01 * dense.norm()


def test_a_lora_of_every_layer_samples_as_on_the_dense_model_and_leaves_no_trace(
    pair: Pair, model: FluxMoETransformer2DModel, bits: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(lora(), tmp_path / "lora.safetensors")
    plain, dense = sample(pipeline(model)), sample(pipeline(dense_with(pair, (lora(), 1.0))))
    pipe = pipeline(model)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="style")
    torch.testing.assert_close(sample(pipe), dense, rtol=1e-4, atol=1e-5)
    assert (dense - plain).norm() > 0.05 * plain.norm()
    assert pipe.get_active_adapters() == ["style"]
    assert pipe.get_list_adapters() == {"transformer": ["style"]}
    pipe.unload_lora_weights()
    assert unchanged(model, bits)


@torch.no_grad()
@pytest.mark.parametrize("target", ["transformer_blocks.2.ff.net.0.proj", "single_transformer_blocks.1.proj_out"])
def test_without_the_permutation_it_would_be_another_lora(
    pair: Pair, model: FluxMoETransformer2DModel, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = lora(targets=(target,), gain=1.0)
    expected = velocity(dense_with(pair, (tensors, 1.0)))
    model.load_lora_adapter(tensors)
    torch.testing.assert_close(velocity(model), expected, rtol=1e-5, atol=1e-5)
    model.unload_lora()
    monkeypatch.setattr(fused.LowRank, "permuted", lambda change, axis, first, order: change)
    model.load_lora_adapter(tensors)
    assert (velocity(model) - expected).norm() > 1e-3 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "compressed"])
def test_a_change_that_is_stored_whole_is_that_of_its_product(kind: str, pair: Pair, compressed: Pair) -> None:
    tensors = lora()
    whole = {
        name.replace("lora_A.weight", "diff"): tensors[name.replace("lora_A", "lora_B")] @ down
        for name, down in tensors.items()
        if "lora_A" in name
    }
    models = [FluxMoETransformer2DModel.from_flux_moe((pair if kind == "plain" else compressed).moe) for _ in range(2)]
    models[0].load_lora_adapter(tensors)
    models[1].load_lora_adapter(whole)
    torch.testing.assert_close(velocity(models[1]), velocity(models[0]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_several_loras_add_up_with_their_weights(
    pair: Pair, model: FluxMoETransformer2DModel, bits: dict[str, Tensor]
) -> None:
    one, two = lora(1), lora(2, TARGETS[::3])

    def dense(first: float, second: float) -> Tensor:
        return velocity(dense_with(pair, (one, first), (two, second)))

    def check(expected: Tensor, **more: Any) -> None:
        torch.testing.assert_close(velocity(model, **more), expected, rtol=1e-5, atol=1e-5)

    pipe = pipeline(model)
    pipe.load_lora_weights(one, adapter_name="one")
    pipe.load_lora_weights(two, adapter_name="two")
    check(dense(0, 1))  # as in diffusers the last one loaded is active
    pipe.set_adapters(["one", "two"], [0.5, -2.0])
    check(dense(0.5, -2))
    check(dense(0.25, -1), joint_attention_kwargs={"scale": 0.5})
    check(dense(0.5, -2))
    pipe.disable_lora()
    check(dense(0, 0))
    assert unchanged(model, bits)
    pipe.enable_lora()
    pipe.delete_adapters("two")
    check(dense(0.5, 0))
    with pytest.raises(ValueError, match="one"):
        model.load_lora_adapter(two, adapter_name="one")
    with pytest.raises(ValueError, match="two"):
        model.set_adapters("two")
    pipe.unload_lora_weights()
    assert unchanged(model, bits)


@torch.no_grad()
def test_fused_loras_stay_until_they_are_unfused(
    pair: Pair, model: FluxMoETransformer2DModel, bits: dict[str, Tensor], tmp_path: Path
) -> None:
    half = velocity(dense_with(pair, (lora(), 0.5)))
    pipe = pipeline(model)
    pipe.load_lora_weights(lora(), adapter_name="style")
    pipe.fuse_lora(lora_scale=0.5)
    assert pipe.num_fused_loras == 1
    pipe.set_adapters("style", 3.0)
    torch.testing.assert_close(velocity(model), half, rtol=1e-5, atol=1e-5)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    pipe.disable_lora()
    assert unchanged(model, bits)
    pipe.enable_lora()
    pipe.set_adapters("style", 0.5)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(velocity(model), half, rtol=1e-5, atol=1e-5)
    # Such a model is no longer the teacher's, and says so.
    model.save_flux_moe(tmp_path / "moe.safetensors")
    model.save_pretrained(tmp_path / "folder")
    for again in (
        FluxMoETransformer2DModel.from_flux_moe(tmp_path / "moe.safetensors"),
        FluxMoETransformer2DModel.from_pretrained(tmp_path / "folder"),
    ):
        assert not again.flux_moe.split_only
        again.set_top_k(12)
        torch.testing.assert_close(velocity(again), half, rtol=1e-5, atol=1e-5)
    assert model.flux_moe.split_only


@torch.no_grad()
def test_a_bfloat16_model_gets_every_bit_back(pair: Pair) -> None:
    model = FluxMoETransformer2DModel.from_flux_moe(pair.moe, torch.bfloat16)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_lora_adapter(lora(1), adapter_name="one")
    model.load_lora_adapter(lora(2), adapter_name="two")
    model.set_adapters(["one", "two"], [0.7, 0.3])
    assert not unchanged(model, bits)
    model.unload_lora()
    assert unchanged(model, bits)


@torch.no_grad()
def test_alphas_and_kohya_names_are_read_as_diffusers_reads_them(pair: Pair, model: FluxMoETransformer2DModel) -> None:
    target = "double_blocks_1_img_mlp_0"
    shape = diffusers_shapes(DIMS)["transformer_blocks.1.ff.net.0.proj.weight"]
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(RANK, shape[1], generator=generator), torch.randn(shape[0], RANK, generator=generator)
    kohya = {
        f"lora_unet_{target}.lora_down.weight": down,
        f"lora_unet_{target}.lora_up.weight": up,
        f"lora_unet_{target}.alpha": torch.tensor(1.5),
    }
    dense, place = load_transformer(pair.dense), "transformer_blocks.1.ff.net.0.proj"
    dense.get_parameter(f"{place}.weight").add_(1.5 / RANK * (up @ down))
    expected = velocity(dense)
    pipeline(model).load_lora_weights(kohya)
    torch.testing.assert_close(velocity(model), expected, rtol=1e-5, atol=1e-5)
    model.unload_lora()
    peft = {f"transformer.{place}.lora_A.weight": down, f"transformer.{place}.lora_B.weight": up}
    model.load_lora_adapter(dict(peft), network_alphas={f"transformer.{place}.alpha": 1.5})
    torch.testing.assert_close(velocity(model), expected, rtol=1e-5, atol=1e-5)
    model.unload_lora()
    model.load_lora_adapter(dict(peft), metadata={"transformer.r": RANK, "transformer.lora_alpha": 1.5})
    torch.testing.assert_close(velocity(model), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_of_several_alpha_patterns_the_first_that_matches_counts_as_in_peft(
    pair: Pair, model: FluxMoETransformer2DModel
) -> None:
    target = "transformer_blocks.1.attn.to_q"
    tensors = lora(targets=(target,))
    expected = velocity(dense_with(pair, (tensors, 6.0 / RANK)))
    patterns = {"attn.to_q": 6.0, "transformer_blocks.1.attn.to_q": 30.0}
    model.load_lora_adapter(tensors, metadata={"transformer.lora_alpha": 1.0, "transformer.alpha_pattern": patterns})
    torch.testing.assert_close(velocity(model), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_compressed_modulations_take_up_what_they_can(compressed: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """A LoRA that reads only what U keeps loses nothing; any other loses what U does not keep, and that is said."""
    model = FluxMoETransformer2DModel.from_flux_moe(compressed.moe)
    model.set_top_k(12)
    assert model.adaln_in is not None
    tensors = lora()
    for name in tensors:
        if ".norm" in name and name.endswith("lora_A.weight"):
            tensors[name] = tensors[name][:, :16] @ model.adaln_in.weight
    model.load_lora_adapter(dict(tensors))
    expected = velocity(dense_with(compressed, (tensors, 1.0)))
    torch.testing.assert_close(velocity(model), expected, rtol=1e-4, atol=1e-4)
    assert "is lost" not in caplog.text
    model.unload_lora()
    model.load_lora_adapter(lora(3))
    assert "of what this LoRA changes in the modulations is lost" in caplog.text


def test_what_is_no_lora_of_flux_is_refused(model: FluxMoETransformer2DModel, bits: dict[str, Tensor]) -> None:
    place = "transformer.transformer_blocks.1.attn.to_q"
    wide = {f"{place}.lora_A.weight": torch.ones(RANK, 64), f"{place}.lora_B.weight": torch.ones(128, RANK)}
    with pytest.raises(
        ValueError, match=r"transformer_blocks.1.attn.to_q.lora_A.weight is \[3, 64\]; expected \[3, 128\]"
    ):
        model.load_lora_adapter(wide)
    with pytest.raises(ValueError, match=r"not a LoRA of FLUX.1: it has blocks.0.to_q.lora_A.weight"):
        model.load_lora_adapter({"transformer.blocks.0.to_q.lora_A.weight": torch.ones(1, 1),
                                 "transformer.blocks.0.to_q.lora_B.weight": torch.ones(1, 1)})  # fmt: skip
    with pytest.raises(ValueError, match="a DoRA, LoKr"):
        model.load_lora_adapter({**lora(), f"{place}.lora_magnitude_vector": torch.ones(128)})
    with pytest.raises(ValueError, match=r"to_q.lora_A.weight is half of a pair"):
        model.load_lora_adapter({f"{place}.lora_A.weight": torch.ones(RANK, 128)})
    assert unchanged(model, bits)


def test_from_pipe_takes_the_model_over_with_its_loras(model: FluxMoETransformer2DModel) -> None:
    from diffusers import FluxImg2ImgPipeline

    pipe = pipeline(model)
    pipe.load_lora_weights(lora(1), adapter_name="one")
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    assert other.transformer is model
    assert other.get_active_adapters() == ["one"]


def test_save_pretrained_says_which_loras_it_saves(
    model: FluxMoETransformer2DModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = pipeline(model)
    pipe.load_lora_weights(lora(1), adapter_name="one")
    with caplog.at_level("WARNING"):
        model.save_pretrained(tmp_path / "with")
        pipe.disable_lora()
        model.save_pretrained(tmp_path / "without")
    (said,) = [record.getMessage() for record in caplog.records if "saved" in record.getMessage()]
    assert "The weights are saved with the LoRAs one in them" in said


def test_a_lora_that_peft_trained_on_attention_is_loaded_and_one_of_experts_is_explained(pair: Pair) -> None:
    peft = pytest.importorskip("peft")

    def trained(*targets: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        own = FluxMoETransformer2DModel.from_flux_moe(pair.moe)
        options = peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(targets), init_lora_weights=False)
        adapted = peft.get_peft_model(own, options)
        moved.append(velocity(adapted))
        state = peft.get_peft_model_state_dict(adapted)
        return {name.replace("base_model.model.", "transformer."): tensor for name, tensor in state.items()}

    moved: list[Tensor] = []
    model = FluxMoETransformer2DModel.from_flux_moe(pair.moe)
    before = velocity(model)
    pipeline(model).load_lora_weights(trained("to_q", "to_k"))
    assert not torch.allclose(moved[0], before)
    torch.testing.assert_close(velocity(model), moved[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="trained on layers that only a FLUX-MoE has"):
        pipeline(model).load_lora_weights(trained("shared_up"))


def test_a_permutation_moves_neurons_and_nothing_else() -> None:
    change = fused.LowRank(up=torch.arange(6.0)[:, None], down=torch.ones(1, 2))
    order = torch.tensor([3, 0, 2, 1])
    assert change.permuted(0, 2, order).dense(torch.device("cpu"))[:, 0].tolist() == [0, 1, 5, 2, 4, 3]


@torch.no_grad()
def test_without_peft_the_model_still_takes_what_a_pipeline_would_give_it(
    pair: Pair, model: FluxMoETransformer2DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(model)
    for module in ("diffusers.utils", "diffusers.loaders.peft", "diffusers.loaders.lora_base"):
        monkeypatch.setattr(f"{module}.USE_PEFT_BACKEND", False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="PEFT backend is required"):
        pipe.load_lora_weights(lora())
    model.load_lora_adapter(pipe.lora_state_dict(lora()), adapter_name="style")
    model.set_adapters("style", 0.5)
    model.fuse_lora()
    torch.testing.assert_close(velocity(model), velocity(dense_with(pair, (lora(), 0.5))), rtol=1e-5, atol=1e-5)
