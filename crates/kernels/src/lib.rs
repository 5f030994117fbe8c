//! Every numerical op once: `cpu` and `cuda` side by side.

pub mod cuda;
