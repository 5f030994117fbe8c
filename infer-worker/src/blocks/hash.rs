//! Names of what a KV block holds, so that two sequences find each other's.

use std::sync::Arc;

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

/// The names of all full blocks of a growing list of ids: those of its beginning, which others share, and its own.
#[derive(Clone, Debug)]
pub struct HashChain {
    root: BlockHash,
    shared: Arc<[BlockHash]>,
    own: Vec<BlockHash>,
}

impl HashChain {
    /// The names of the full blocks of `ids`.
    pub fn names(root: BlockHash, ids: &[u32]) -> Arc<[BlockHash]> {
        let mut parent = root;
        let blocks = ids.chunks_exact(BLOCK_TOKENS);
        blocks
            .map(|block| {
                parent = parent.child(block);
                parent
            })
            .collect()
    }

    /// One that begins with these.
    pub fn new(root: BlockHash, names: Arc<[BlockHash]>) -> Self {
        Self {
            root,
            shared: names,
            own: Vec::new(),
        }
    }

    /// Names the block of these ids after the last one.
    ///
    /// # Panics
    /// When `ids` are not [`BLOCK_TOKENS`].
    pub fn push(&mut self, ids: &[u32]) {
        let last = self.own.last().or(self.shared.last());
        let name = last.unwrap_or(&self.root).child(ids);
        self.own.push(name);
    }

    /// How many names there are.
    pub fn len(&self) -> usize {
        self.shared.len() + self.own.len()
    }

    /// The name of the `i`-th block.
    ///
    /// # Panics
    /// When it has none.
    pub fn get(&self, i: usize) -> &BlockHash {
        match i.checked_sub(self.shared.len()) {
            None => &self.shared[i],
            Some(i) => &self.own[i],
        }
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
        let whole = HashChain::names(root, &ids);
        assert_eq!(whole.len(), 3);
        assert_eq!(whole[1], root.child(&ids[..16]).child(&ids[16..32]));
        for shared in 0..=3 {
            let begin = HashChain::names(root, &ids[..shared * BLOCK_TOKENS]);
            let mut grown = HashChain::new(root, begin);
            for block in ids.chunks_exact(BLOCK_TOKENS).skip(shared) {
                grown.push(block);
            }
            assert_eq!(grown.len(), 3);
            assert!((0..3).all(|i| grown.get(i) == &whole[i]), "{shared}");
        }
    }
}
