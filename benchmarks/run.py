"""Performance as ratios within one run: `python benchmarks/run.py [CASE ...]` prints one table row per case.

Every case alternates its two sides and reports the median ratio of paired rounds with its range, because absolute
times of a shared machine say little. Cases use the library alone, so they also run where lmms-eval is not installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_keyspace import divergence, embedded, scenes, stats
from lmms_keyspace.capture import Capture, Row
from lmms_keyspace.families import decoder_sites
from lmms_keyspace.sampling import Sampler
from lmms_keyspace.tokens import Labeler, Prompt

ROUNDS = 15
DOCUMENTS = 64
BATCH = 16
Side = Callable[[], object]


def paired(slow: Side, fast: Side, synchronize: Callable[[], None]) -> list[float]:
    """Time of `slow` over time of `fast`, round by round, after one round of each that does not count."""

    def seconds(side: Side) -> float:
        synchronize()
        start = time.perf_counter()
        side()
        synchronize()
        return time.perf_counter() - start

    seconds(slow), seconds(fast)
    return [seconds(slow) / seconds(fast) for _ in range(ROUNDS)]


class Bundled:
    """The bundled model with documents of the probe's generator, in batches ready for `generate`."""

    def __init__(self, device: torch.device, adapter: str | None = None) -> None:
        folder = embedded.base_path()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        if adapter is not None:
            self.model = PeftModel.from_pretrained(self.model, str(embedded.adapter_path(adapter))).to(device).eval()
        prompts, pictures = [], []
        for index in range(DOCUMENTS):
            family = scenes.CORE_FAMILIES[index % len(scenes.CORE_FAMILIES)]
            r = scenes.rng("dev", "benchmark", index)
            item = scenes.draw_item(family, r, space="dev")
            text = scenes.prompt(item.question, context=scenes.hint(item, item.gold, index % scenes.N_TEMPLATES))
            content = [{"type": "image"}, {"type": "text", "text": text}]
            chat = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            prompts.append(Prompt("benchmark", index, str(index), "match", chat, content=(text,)))
            pictures.append(scenes.render(item.spec))
        self.batches = []
        for start in range(0, DOCUMENTS, BATCH):
            chosen = slice(start, start + BATCH)
            inputs = self.processor(
                text=[prompt.text for prompt in prompts[chosen]],
                images=pictures[chosen],
                padding=True,
                return_tensors="pt",
            ).to(device)
            self.batches.append((prompts[chosen], inputs))
        self.prompts = prompts

    def generate(self) -> None:
        with torch.inference_mode():
            for _, inputs in self.batches:
                self.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)

    def prefill(self) -> None:
        with torch.inference_mode():
            for _, inputs in self.batches:
                self.model(**inputs, use_cache=False)

    def generate_captured(self) -> None:
        decoder = decoder_sites(self.model)
        labeler = Labeler(self.processor.tokenizer, decoder.image_token_id).fit(self.prompts)
        sampler = Sampler(seed=0)
        capture = Capture(self.model, decoder)
        with torch.inference_mode():
            for prompts, inputs in self.batches:
                grids = decoder.image_grids(inputs)
                rows = []
                for index, prompt in enumerate(prompts):
                    ids = inputs["input_ids"][index][inputs["attention_mask"][index].bool()].cpu().numpy()
                    labels = labeler.label(prompt, ids, None if grids is None else grids[index : index + 1])
                    positions = sampler.choose_positions(prompt.task, prompt.cluster, labels)
                    rows.append(Row(prompt, ids, labels, np.asarray(positions)))
                with capture.batch(rows):
                    self.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)


def capture_overhead(device: torch.device, synchronize: Callable[[], None]) -> list[float]:
    """Generation with every document captured (labels, sample, attention mass) over generation without."""
    bundled = Bundled(device)
    return paired(bundled.generate_captured, bundled.generate, synchronize)


def malora_prefill(device: torch.device, synchronize: Callable[[], None]) -> list[float]:
    """A prefill with the bundled MaLoRA adapter over one with the plain LoRA of equal parameters."""
    return paired(Bundled(device, "malora").prefill, Bundled(device, "lora").prefill, synchronize)


def robust_mmd(tokens: int, device: torch.device, synchronize: Callable[[], None]) -> list[float]:
    """The MMD part of the table over its floor, for two heads of width 128 with `tokens` tokens a side.

    The part: bandwidths, kernel sums at five scales, 1,000 block permutations, 1,000 bootstrap draws. The floor: one
    float32 product that makes the kernel matrix of both sides together, and one exp over it, in memory that is reused.
    """
    heads, width = 2, 128
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(heads, tokens, width, generator=generator).to(device) for _ in range(2))
    groups = np.repeat(np.arange(tokens // 32), 32)
    scaled = torch.cat([x, y], dim=1) / width**0.5
    matrix = torch.empty(2 * tokens, 2 * tokens, device=device)

    def floor() -> None:
        for head in scaled:
            torch.mm(head, head.T, out=matrix)
            matrix.exp_()

    def part() -> None:
        bandwidth2 = divergence.median_bandwidth2(x, y)
        sums = divergence.kernel_sums(x, y, groups_x=groups, groups_y=groups, bandwidth2=bandwidth2)
        stats.permutation_test(sums)
        stats.mmd2_bootstrap(sums)

    return paired(part, floor, synchronize)


def robust_mmd_2048(device: torch.device, synchronize: Callable[[], None]) -> list[float]:
    return robust_mmd(2048, device, synchronize)


def robust_mmd_4096(device: torch.device, synchronize: Callable[[], None]) -> list[float]:
    return robust_mmd(4096, device, synchronize)


CASES = {case.__name__: case for case in (capture_overhead, malora_prefill, robust_mmd_2048, robust_mmd_4096)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    unknown = sorted(set(given.cases) - set(CASES))
    if unknown:
        parser.error(f"no case {unknown[0]}; there are {', '.join(CASES)}")
    device = torch.device(given.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print(f"| case | device | ratio, median of {ROUNDS} | min | max |\n|---|---|---|---|---|")
    for case in given.cases or CASES:
        ratios = CASES[case](device, synchronize)
        print(f"| {case} | {name} | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
