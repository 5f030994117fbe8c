//! Every numerical op once: `cpu` and `cuda` side by side.
