"""Faults of what leaves as StableHLO, and of its runner."""

from faults.fault import Fault

BITS = "export_stablehlo::test_every_phase_gives_the_bits_of_the_model"
ANSWERS = "export_stablehlo::test_the_runner_answers_as_generate_does_without_this_package"
TEXT = "export_stablehlo::test_the_runners_tokenizer_is_sentencepiece"
FAULTS = (
    Fault(
        "padding of a prompt is read",
        "export/programs.py",
        "last_B1D = jnp.take_along_axis(hidden_BLD, (length_B - 1)[:, None, None], axis=1)",
        "last_B1D = hidden_BLD[:, -1:]",
        BITS,
    ),
    Fault(
        "norms leave in bfloat16",
        "export/stablehlo.py",
        '"float32" if "norm" in trained.axes[name] else dtype',
        "dtype",
        "export_stablehlo::test_weights_in_bfloat16_are_those_that_generate_computes_with",
    ),
    Fault(
        "one platform",
        "export/programs.py",
        "platforms=PLATFORMS)",
        'platforms=("cpu",))',
        "export_stablehlo::test_it_is_for_three_platforms",
    ),
    Fault(
        "latents are not scaled back",
        "export/programs.py",
        "image_Bhwc / codec.scale + codec.shift",
        "image_Bhwc + codec.shift",
        "export_stablehlo::test_latents_become_pictures",
    ),
    Fault(
        "a runner without guidance",
        "export/runner.py",
        'found[1] + about["guidance"] * (found[0] - found[1])',
        "found[0]",
        ANSWERS,
    ),
    Fault(
        "what follows an image sees it noisy",
        "export/runner.py",
        "_, *cache = predict(x, about[",
        "predict(x, about[",
        ANSWERS,
    ),
    Fault(
        "every answer of a runner alike",
        "export/runner.py",
        "jax.random.fold_in(jax.random.key(np.uint32(seed)), row)",
        "jax.random.fold_in(jax.random.key(np.uint32(seed)), 0)",
        ANSWERS,
    ),
    Fault(
        "the merge that is likeliest comes last",
        "export/runner_tokenizer.py",
        "(-self.scores[self.ids[joined]], a, b, joined)",
        "(self.scores[self.ids[joined]], a, b, joined)",
        TEXT,
    ),
    Fault(
        "bytes that are no text share a mark",
        "export/runner_tokenizer.py",
        'errors="each_byte"',
        'errors="replace"',
        TEXT,
    ),
    Fault(
        "a runner puts codes among the tokens of text",
        "export/runner.py",
        '(self.about["vocabulary"] + image_hwc.reshape(-1).astype(int)).tolist()',
        "image_hwc.reshape(-1).astype(int).tolist()",
        "export_stablehlo::test_images_that_are_codes_leave_as_tokens",
    ),
    Fault(
        "a runner draws all codes of an image with one key",
        "export/runner.py",
        "_choose(logits, key, i, ",
        "_choose(logits, key, 0, ",
        "export_stablehlo::test_the_runner_writes_images_of_codes",
    ),
    Fault(
        "every unknown character is a token",
        "export/runner_tokenizer.py",
        "if not n or {i, ids[n - 1]} != {unknown}",
        "if True",
        "export_stablehlo::test_other_byte_pair_tokenizers_are_imitated_or_refused",
    ),
    Fault(
        "run.py takes a seed that JAX does not",
        "export/runner.py",
        '(0 <= asked["seed"] < 2**32, ',
        '(0 <= asked["seed"], ',
        "export_stablehlo::test_the_runner_refuses_in_a_line_what_it_cannot_read",
    ),
)
