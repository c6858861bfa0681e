"""Faults of what leaves as a Llama, as GGUF or for diffusers, and of Llamas that are imported."""

from faults.fault import Fault

TOKENIZER = "export/tokenizer_json.py"
SOURCE = "export/from_llama.py"
CONFIG = "export/llama_config.py"
GGUF = "export/gguf.py"
DIFFUSERS = "autoencoder/published.py"

FAULTS = (
    Fault(
        "the last rows of the vocabulary are kept instead of the first",
        "export/llama.py",
        "next(arrays))[:rows]",
        "next(arrays))[-rows if rows else None :]",
        "export_llama",
    ),
    Fault(
        "image marks are cut off",
        "export/llama.py",
        "rows = trained.tokenizer.size if",
        "rows = trained.tokenizer.boi if",
        "export_llama",
    ),
    Fault(
        "every layer is the first",
        "export/llama.py",
        "        if not tensor.layer:\n",
        "        if True:\n",
        "export_llama",
    ),
    Fault(
        "text does not end where an image begins",
        "export/llama.py",
        "        ends.append(tokenizer.boi)\n",
        "        pass\n",
        "export_llama::test_padding_is_cut_and_image_marks_stay",
    ),
    Fault(
        "theta where version 5 alone looks",
        "model/published.py",
        '        "rope_theta": model.rope_theta,\n        "rope_scaling"',
        '        "rope_scaling"',
        "export_llama::test_both_versions_of_transformers_find_theta_and_scaling",
    ),
    Fault(
        "worst merges first",
        TOKENIZER,
        "(-scores[piece], -len(piece))",
        "(scores[piece], -len(piece))",
        "export_llama::test_ids_equal_those_of_sentencepiece",
    ),
    Fault(
        "short runs of spaces first",
        TOKENIZER,
        "(-scores[piece], -len(piece))",
        "(-scores[piece], len(piece))",
        "export_llama::test_ids_equal_those_of_sentencepiece",
    ),
    Fault(
        "unknown characters one by one",
        TOKENIZER,
        '"fuse_unk": True',
        '"fuse_unk": False',
        "export_llama::test_ids_equal_those_of_sentencepiece",
    ),
    Fault(
        "no space before a text",
        TOKENIZER,
        '        steps.append({"type": "Prepend", "prepend": SPACE})\n',
        "        pass\n",
        "export_llama::test_ids_equal_those_of_sentencepiece",
    ),
    Fault(
        "spaces before every line are cut off",
        TOKENIZER,
        'r"\\A +"',
        'r"^ +"',
        "export_llama::test_ids_equal_those_of_sentencepiece",
    ),
    Fault(
        "texts do not begin with bos",
        TOKENIZER,
        '        return [token, {"Sequence"',
        '        return [{"Sequence"',
        "export_llama::test_a_text_begins_with_bos_and_image_marks_are_tokens",
    ),
    Fault(
        "queries and keys stay in Meta's order",
        SOURCE,
        "    return pairs.swapaxes(1, 2).reshape(tensor.shape)",
        "    return pairs.reshape(tensor.shape)",
        "import_llama",
    ),
    Fault(
        "keys of Meta's layout have the heads of queries",
        SOURCE,
        "halves_apart(tensor, model.num_kv_heads)",
        "halves_apart(tensor, model.heads)",
        "import_llama",
    ),
    Fault(
        "new rows of the vocabulary are nought",
        SOURCE,
        "    found[len(tensor) :] = mean\n",
        "    found[len(tensor) :] = 0\n",
        "import_llama::test_new_rows_are_the_mean_of_the_others",
    ),
    Fault(
        "image marks have no room",
        SOURCE,
        "max(entries + 2, described.model.vocab_size)",
        "max(entries, described.model.vocab_size)",
        "import_llama",
    ),
    Fault(
        "frequencies of a file are never scaled",
        CONFIG,
        '        rope_scaling=_scaling(raw.get("rope_scaling") or rope),\n',
        "",
        "import_llama",
    ),
    Fault(
        "theta of version 5 is not read",
        CONFIG,
        'raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0',
        'raw.get("rope_theta") or 10_000.0',
        "import_llama",
    ),
    Fault(
        "kept and divided frequencies swapped",
        "model/rope.py",
        "frequency * (kept + (1.0 - kept) / scaling.factor)",
        "frequency * (1.0 - kept + kept / scaling.factor)",
        "import_llama export_llama",
    ),
    Fault(
        "gguf keeps halves apart",
        GGUF,
        "    return halves.swapaxes(1, 2).reshape(array.shape)",
        "    return halves.reshape(array.shape)",
        "export_gguf",
    ),
    Fault(
        "gguf norms in the dtype of matrices",
        GGUF,
        'dtype if len(shape) > 1 else "float32"',
        "dtype",
        "export_gguf::test_names_shapes_kinds_and_settings",
    ),
    Fault(
        "kernels leave with rows and columns swapped",
        DIFFUSERS,
        "array.transpose(3, 2, 0, 1)",
        "array.transpose(3, 2, 1, 0)",
        "export_autoencoder",
    ),
    Fault(
        "attention of the encoder is not said",
        DIFFUSERS,
        "last = ATTENTION_DOWN if config.encoder_attention else DOWN",
        "last = DOWN",
        "export_autoencoder",
    ),
    Fault(
        "any number of groups will do",
        DIFFUSERS,
        "        len(groups) == 1,\n",
        "        True,\n",
        "export_autoencoder::test_what_diffusers_has_not_is_refused_in_a_line",
    ),
    Fault(
        "shift is not written",
        DIFFUSERS,
        '                "shift_factor": shift,\n',
        '                "shift_factor": 0.0,\n',
        "export_autoencoder",
    ),
)
