//! Names of what a KV block holds, so that two sequences find each other's.

use sha2::{Digest, Sha256};

use crate::executor::BLOCK_TOKENS;

/// Names the keys and values of a full block: equal only where everything that they were computed from is equal. It is
/// SHA-256, because requests are strangers to each other: nobody may be able to make a prompt that meets the block of
/// another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash([u8; 32]);

/// The digest of an adapter's content. Two loads of the same files share blocks; a changed file shares none.
pub type AdapterDigest = [u8; 32];

impl BlockHash {
    /// The parent of all first blocks under these weights.
    pub fn root(weight_version: u64, adapter: Option<&AdapterDigest>) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"espalier kv 1");
        hash.update(weight_version.to_le_bytes());
        // The lengths differ, so that no adapter is the base.
        if let Some(adapter) = adapter {
            hash.update(adapter);
        }
        Self(hash.finalize().into())
    }

    /// The block of these ids after this one.
    ///
    /// # Panics
    /// When `ids` are not [`BLOCK_TOKENS`]: only full blocks have names.
    pub fn child(&self, ids: &[u32]) -> Self {
        assert_eq!(ids.len(), BLOCK_TOKENS, "only full blocks have names");
        let mut bytes = [0; 32 + 4 * BLOCK_TOKENS];
        bytes[..32].copy_from_slice(&self.0);
        for (bytes, id) in bytes[32..].chunks_exact_mut(4).zip(ids) {
            bytes.copy_from_slice(&id.to_le_bytes());
        }
        Self(Sha256::digest(bytes).into())
    }
}

/// The names of all full blocks of a growing list of ids.
#[derive(Clone, Debug)]
pub struct HashChain {
    root: BlockHash,
    hashes: Vec<BlockHash>,
}

impl HashChain {
    /// Of no ids yet.
    pub fn new(root: BlockHash) -> Self {
        Self {
            root,
            hashes: Vec::new(),
        }
    }

    /// Names the blocks of `ids` that became full since the last call. `ids` only ever grow.
    pub fn extend(&mut self, ids: &[u32]) {
        for block in ids.chunks_exact(BLOCK_TOKENS).skip(self.hashes.len()) {
            let parent = self.hashes.last().unwrap_or(&self.root);
            self.hashes.push(parent.child(block));
        }
    }

    /// The names so far, in the order of blocks.
    pub fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_depends_on_all_that_the_block_was_computed_from() {
        let ids: Vec<u32> = (0..16).collect();
        let mut other = ids.clone();
        other[15] = 99;
        let base = BlockHash::root(1, None);
        let names = [
            base,
            base.child(&ids),
            base.child(&other),
            base.child(&ids).child(&ids),
            BlockHash::root(2, None).child(&ids),
            BlockHash::root(1, Some(&[0; 32])).child(&ids),
            BlockHash::root(1, Some(&[1; 32])).child(&ids),
        ];
        for (i, a) in names.iter().enumerate() {
            assert!(names[i + 1..].iter().all(|b| a != b), "{i}");
        }
    }

    #[test]
    fn a_chain_that_grows_has_the_names_of_one_that_is_made_at_once() {
        let ids: Vec<u32> = (0..50).map(|i| i * 7 % 13).collect();
        let root = BlockHash::root(0, None);
        let mut grown = HashChain::new(root);
        for end in 0..=ids.len() {
            grown.extend(&ids[..end]);
            assert_eq!(grown.hashes().len(), end / BLOCK_TOKENS);
        }
        let mut whole = HashChain::new(root);
        whole.extend(&ids);
        assert_eq!(whole.hashes(), grown.hashes());
        assert_eq!(
            whole.hashes()[1],
            root.child(&ids[..16]).child(&ids[16..32])
        );
    }
}
