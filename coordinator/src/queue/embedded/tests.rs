//! Faults of the disk, and what the conformance suite finds here.
