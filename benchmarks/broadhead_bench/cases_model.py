"""The cases of a whole model of transformers: a long prompt, generation for several sequences, a step of training."""

from __future__ import annotations

from typing import NamedTuple

from broadhead_bench.cases_backward import CPU_MODEL, GEMMA4_GLOBAL, GEMMA4_LOCAL, ModelShape, StepCase

#: Gemma 4's layers, as wide as in a model of about 30 billion parameters, so that attention has the share of the time
#: that it has there. Six layers are one period of their pattern.
WIDE_MODEL = ModelShape(5376, 21504, 32000, 5, GEMMA4_LOCAL, GEMMA4_GLOBAL)
PREFILL_TOKENS, STEP_TOKENS = 32768, 8192
#: Sequences, the tokens of their contexts, and the tokens that one measured call generates for each.
GENERATION = (8, 8192, 16)


class InferenceCase(NamedTuple):
    """A forward pass over ``tokens`` of each sequence, or, where there are new tokens, so many steps behind it."""

    batch: int
    tokens: int
    new_tokens: int  # 0: the prompt itself is measured
    model: ModelShape
    area: str = "model"

    @property
    def name(self) -> str:
        _, _, head_dim, window = self.model.local
        what = f"generate B{self.batch} ctx{self.tokens} +{self.new_tokens}" if self.new_tokens else "prefill"
        size = what if self.new_tokens else f"{what} B{self.batch} S{self.tokens}"
        return f"{size} hidden{self.model.hidden} D{head_dim} window{window} D{self.model.wide[2]}"

    @property
    def measured_tokens(self) -> int:
        """Tokens of one measured call."""
        return self.batch * (self.new_tokens or self.tokens)


def model_cases(on_cpu: bool = False) -> list[InferenceCase | StepCase]:
    """A prompt, generation and a step.

    Args:
        on_cpu: the tiny set that the torch fallback can run.
    """
    if on_cpu:
        return [
            InferenceCase(1, 70, 0, CPU_MODEL),
            InferenceCase(3, 40, 4, CPU_MODEL),
            StepCase(48, CPU_MODEL, "model"),
        ]
    return [
        InferenceCase(1, PREFILL_TOKENS, 0, WIDE_MODEL),
        InferenceCase(*GENERATION, WIDE_MODEL),
        StepCase(STEP_TOKENS, WIDE_MODEL, "model"),
    ]
