//! Against transformers and PEFT: see `train-worker/tests/golden`.
