"""Configurations that cannot work, and what the one line about each must name. Used by several tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Damaged:
    """``text`` goes into ``run.yaml``; ``names``: pieces of the message (the place, the key, what is nearest)."""

    name: str
    text: str | bytes
    names: tuple[str, ...]
    overrides: tuple[str, ...] = ()


DAMAGED = [
    # names that are wrong
    Damaged("misspelt key", "model:\n  d_modle: 64\n", ("run.yaml:2", "model.d_modle", "nearest: model.d_model")),
    Damaged("misspelt section", "# x\ntrainning:\n  max_steps: 9\n", ("run.yaml:2", "trainning", "nearest: training")),
    Damaged("key of another section", "model:\n  lr: 1e-3\n", ("run.yaml:2", "model.lr", "nearest: optimizer.lr")),
    Damaged("key of a section below", "optimizer: {warmup: 0}\n", ("optimizer.warmup", "optimizer.schedule.warmup")),
    Damaged("key like nothing", "eval:\n  zzz: 1\n", ("run.yaml:2", "eval.zzz", "max_tokens, rows")),
    Damaged("key under a free name", "data: {validation: {a: {pths: []}}}\n", ("nearest: data.validation.a.paths",)),
    Damaged("misspelt choice", "data:\n  order: lane\n", ("run.yaml:2", "data.order", "nearest: lanes")),
    Damaged("misspelt mixer", "model: {mixer: {name: paragruu}}\n", ("run.yaml:1", "paragruu", "'paragru'")),
    Damaged("mixer without a name", "model: {mixer: {d_conv: 4}}\n", ("run.yaml:1", "model.mixer.name", "paragru")),
    Damaged(
        "misspelt mixer key", "model:\n  mixer:\n    name: paragru\n    d_cnv: 4\n", ("run.yaml:4", "d_cnv", "d_conv")
    ),
    Damaged("misspelt optimizer", "optimizer: {name: adam}\n", ("run.yaml:1", "optimizer.name", "nearest: adamw")),
    Damaged("misspelt launcher", "launcher:\n  kind: locl\n", ("launcher.kind", "locl", "nearest: local")),
    # values that are wrong
    Damaged("text for a number", "optimizer:\n  lr: fast\n", ("run.yaml:2", "optimizer.lr", "a number, got fast")),
    Damaged("fraction for an integer", "training:\n  max_steps: 1e3\n", ("training.max_steps", "write 1000")),
    Damaged("boolean for an integer", "training: {seq_len: true}\n", ("training.seq_len", "an integer, got true")),
    Damaged("integer for a boolean", "run: {deterministic: 1}\n", ("run.deterministic", "true or false, got 1")),
    Damaged("yes for a boolean", "run: {deterministic: yes}\n", ("run.deterministic", "true or false, got 'yes'")),
    Damaged("number for text", "run:\n  name: 12\n", ("run.yaml:2", "run.name", "put it in quotes")),
    Damaged("value for a section", "model: large\n", ("run.yaml:1", "model", "keys with values", "got large")),
    Damaged("text for a list", "eval: {prompts: def}\n", ("eval.prompts", "a list", "got def")),
    Damaged("too few values", "optimizer: {betas: [0.9]}\n", ("optimizer.betas", "2 values, got [0.9]")),
    Damaged(
        "mixer value of a wrong type", "model: {mixer: {name: paragru, d_conv: '4'}}\n", ("model.mixer.d_conv", "'4'")
    ),
    # values out of range
    Damaged("zero width", "model:\n  d_model: 0\n", ("run.yaml:2", "model.d_model", "greater than 0, got 0")),
    Damaged("dropout of one", "model: {dropout: 1.0}\n", ("model.dropout", "less than 1, got 1.0")),
    Damaged("negative seed", "run: {seed: -1}\n", ("run.seed", "got -1")),
    Damaged("infinite rate", "optimizer:\n  lr: .inf\n", ("run.yaml:2", "optimizer.lr", "finite")),
    Damaged(
        "vocabulary below the bytes", "data: {tokenizer: {vocab_size: 100}}\n", ("data.tokenizer.vocab_size", "300")
    ),
    Damaged("blocks below none", "training: {activation_checkpointing: -1}\n", ("activation_checkpointing", "got -1")),
    Damaged(
        "misspelt auto", "training:\n  activation_checkpointing: atuo\n", ("run.yaml:2", "auto or a number", "got atuo")
    ),
    Damaged(
        "profile ends before it begins",
        "training: {profile_steps: [5, 3]}\n",
        ("training.profile_steps", "[first, last]", "[5, 3]"),
    ),
    Damaged(
        "compiled, nothing to compile",
        "model: {mlp: {enabled: false}}\ntraining: {compile: true}\n",
        ("training.compile", "model.mlp.enabled is false"),
    ),
    Damaged(
        "compiled dropout",
        "model: {dropout: 0.1}\ntraining: {compile: true}\n",
        ("training.compile", "model.dropout", "use one"),
    ),
    Damaged(
        "compiled at stage 3",
        "parallel: {zero_stage: 3}\ntraining: {compile: true}\n",
        ("training.compile", "use stage 0, 1 or 2"),
    ),
    Damaged(
        "more blocks than there are",
        "model: {n_layers: 2}\ntraining: {activation_checkpointing: 3}\n",
        ("run.yaml:2", "training.activation_checkpointing", "model.n_layers 2"),
    ),
    Damaged("a path for a name", "run: {name: ../other}\n", ("run.name", "got ../other")),
    # combinations
    Damaged("text without paths", "data:\n  source:\n    kind: text\n", ("run.yaml:2", "data.source", "'paths'")),
    Damaged("dataset without a name", "data: {source: {kind: datasets}}\n", ("data.source", "'dataset'")),
    Damaged(
        "carried state in windows", "training:\n  carry_state: true\n", ("run.yaml:2", "carry_state", "data.order")
    ),
    Damaged(
        "heads that do not divide",
        "model:\n  d_model: 64\n  mixer: {name: paragru, n_heads: 3}\n",
        ("run.yaml:3", "model.mixer.n_heads", "64"),
    ),
    Damaged(
        "decay before the warm-up's end",
        "training: {max_steps: 100}\noptimizer:\n  schedule: {kind: wsd, warmup: 50, decay: 0.8}\n",
        ("run.yaml:3", "optimizer.schedule", "50", "80 steps", "max_steps 100"),
    ),
    Damaged(
        "vocabulary below the tokenizer's", "model:\n  vocab_size: 512\n", ("run.yaml:2", "model.vocab_size", "4096")
    ),
    # a task instead of text
    Damaged("task without a name", "data: {synthetic: {max_len: 9}}\n", ("run.yaml:1", "data.synthetic.task: missing")),
    Damaged(
        "misspelt task",
        "data:\n  synthetic:\n    task: partiy\n",
        ("run.yaml:3", "data.synthetic.task", "nearest: parity"),
    ),
    Damaged(
        "misspelt setting of a task",
        "data:\n  synthetic:\n    task: parity\n    max_length: 9\n",
        ("run.yaml:4", "task 'parity'", "nearest: data.synthetic.max_len"),
    ),
    Damaged(
        "setting of another task", "data: {synthetic: {task: parity, group: S3}}\n", ("data.synthetic.group", "max_len")
    ),
    Damaged(
        "text for a setting",
        "data: {synthetic: {task: parity, max_len: long}}\n",
        ("run.yaml:1", "data.synthetic.max_len: expected an integer, got long"),
    ),
    Damaged(
        "misspelt choice of a setting",
        "data: {synthetic: {task: parity, labels: al}}\n",
        ("data.synthetic.labels", "'last' or 'every'", "got al"),
    ),
    Damaged("no such group", "data: {synthetic: {task: words, group: S7}}\n", ("data.synthetic.group", "S7", "S5")),
    Damaged(
        "a size that is none",
        "data: {synthetic: {task: mqar, mixture: ['64x4']}}\n",
        ("data.synthetic.mixture", "64x4", "LENGTH:PAIRS"),
    ),
    Damaged(
        "lengths the wrong way round",
        "data: {synthetic: {task: parity, min_len: 9, max_len: 8}}\n",
        ("data.synthetic.max_len", "min_len, 9"),
    ),
    Damaged(
        "a task and text",
        "data:\n  synthetic: {task: parity}\n  source: {kind: text, paths: [a]}\n",
        ("run.yaml:1", "'source' is of text", "data.synthetic"),
    ),
    Damaged(
        "a task and a tokenizer",
        "data: {synthetic: {task: parity}, tokenizer: {vocab_size: 512}}\n",
        ("'tokenizer' is of text", "data.synthetic"),
    ),
    Damaged(
        "examples longer than rows",
        "data: {synthetic: {task: parity}}\ntraining:\n  seq_len: 32\n",
        ("run.yaml:3", "training.seq_len", "parity", "40"),
    ),
    Damaged(
        "carried state over examples",
        "data: {synthetic: {task: parity}}\ntraining: {carry_state: true}\n",
        ("run.yaml:2", "training.carry_state", "data.synthetic"),
    ),
    Damaged(
        "noise as a state of which no part is free",
        "model: {mixer: {name: slstm}}\ntraining:\n  initial_state: noise\n",
        ("training.initial_state: noise cannot be the state of mixer slstm",),
    ),
    Damaged(
        "passed states that grow",
        "model: {mixer: {name: attention}}\ntraining:\n  initial_state: passed\n",
        ("training.initial_state: the state of mixer attention grows",),
    ),
    Damaged(
        "a vocabulary that the passkey task's texts have not",
        "data: {synthetic: {task: passkey, vocab_size: 100}}\n",
        ("run.yaml:1", "data.synthetic.vocab_size", "262 to 1363"),
    ),
    Damaged(
        "examples that start from another's state",
        "data: {synthetic: {task: parity}}\ntraining: {initial_state: passed}\n",
        ("run.yaml:2", "training.initial_state", "data.synthetic"),
    ),
    # files
    Damaged("key given twice", "run:\n  seed: 1\n  seed: 2\n", ("run.yaml:3", "run.seed", "line 2")),
    Damaged("tab for spaces", "model:\n\td_model: 64\n", ("run.yaml:2", "not valid YAML")),
    Damaged("bracket left open", "eval:\n  prompts: [a\n", ("run.yaml:", "not valid YAML")),
    Damaged("empty file", "", ("run.yaml", "empty")),
    Damaged("truncated to nothing but comments", "# a run\n", ("run.yaml", "empty")),
    Damaged("a list", "- model\n", ("run.yaml", "got [model]")),
    Damaged("not text", b"\xff\xfe\x00model", ("run.yaml", "UTF-8")),
    Damaged("an object", "run: !!python/object/apply:os.getcwd []\n", ("run.yaml:1", "run", "python/object")),
    Damaged("contains itself", "run: &a {name: *a}\n", ("run.yaml", "contains itself")),
    Damaged("numbers as keys", "run:\n  1: a\n", ("run.yaml:2", "run.1", "quotes")),
    Damaged("missing include", "run: {}\ninclude: quickstrat\n", ("run.yaml:2", "quickstrat", "nearest: quickstart")),
    Damaged("include of itself", "include: run.yaml\n", ("run.yaml:1", "circle", "run.yaml → run.yaml")),
    Damaged("missing module", "imports: [no_such_module_]\n", ("imports", "no_such_module_")),
    Damaged("missing cell file", "imports: [cells.py]\n", ("imports", "cells.py", "no such file")),
    # overrides
    Damaged("override without a value", "run: {}\n", ("override 'model.d_model'", "key=value"), ("model.d_model",)),
    Damaged("misspelt override", "run: {}\n", ("nearest: run.seed",), ("run.sed=1",)),
    Damaged("override of a wrong type", "run: {}\n", ("override 'run.seed=x'", "an integer"), ("run.seed=x",)),
    Damaged("override that is no YAML", "run: {}\n", ("override 'run.seed=[1'", "not valid YAML"), ("run.seed=[1",)),
    Damaged("section emptied", "run: {}\n", ("override 'model=null'", "model"), ("model=null",)),
]
