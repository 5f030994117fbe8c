//! Who owns which KV block, and which blocks hold what somebody else can use again.
//!
//! Plain data: no memory of a device is touched here. A block is *free*, *owned* by one sequence that writes it,
//! *shared* by any number that only read it, or *cached*: full, named, and used by nobody, until its place is needed.
//! Only a named block is ever shared, and a name is given only to a full block, which nobody writes again. All
//! operations take constant time. The [scheduler](crate::scheduler) is the only caller.

mod hash;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

pub use hash::{AdapterDigest, BlockHash, HashChain};

use crate::executor::BlockId;

/// The end of a list.
const NONE: u32 = u32::MAX;

/// A full block that has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named {
    /// The block.
    pub block: BlockId,
    /// The step that fills it, by the caller's count: what is in the block can be read by later steps.
    pub filled_in: u64,
    /// Nobody uses it now, so that sharing it leaves one block fewer for others.
    pub idle: bool,
}

#[derive(Clone, Debug)]
struct Block {
    users: u32,
    name: Option<BlockHash>,
    filled_in: u64,
    /// Neighbours among cached blocks, the least recently used first; `next` also links free blocks.
    previous: u32,
    next: u32,
}

/// All KV blocks of an executor.
#[derive(Clone, Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    by_name: HashMap<BlockHash, u32>,
    first_free: u32,
    free: u32,
    least_recent: u32,
    most_recent: u32,
    cached: u32,
}

impl BlockPool {
    /// `count` free blocks.
    pub fn new(count: u32) -> Self {
        let block = |i: u32| Block {
            users: 0,
            name: None,
            filled_in: 0,
            previous: NONE,
            next: if i + 1 < count { i + 1 } else { NONE },
        };
        Self {
            blocks: (0..count).map(block).collect(),
            by_name: HashMap::with_capacity(count as usize),
            first_free: if count == 0 { NONE } else { 0 },
            free: count,
            least_recent: NONE,
            most_recent: NONE,
            cached: 0,
        }
    }

    /// How many blocks there are.
    pub fn total(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// How many blocks [`take`](Self::take) would give: free and cached ones.
    pub fn available(&self) -> u32 {
        self.free + self.cached
    }

    /// How many blocks are cached: full, named and used by nobody.
    pub fn cached(&self) -> u32 {
        self.cached
    }

    /// How many sequences use the block.
    pub fn users(&self, block: BlockId) -> u32 {
        self.blocks[block.0 as usize].users
    }

    /// The block of this name, without using it.
    pub fn find(&self, name: &BlockHash) -> Option<Named> {
        let index = *self.by_name.get(name)?;
        let block = &self.blocks[index as usize];
        Some(Named {
            block: BlockId(index),
            filled_in: block.filled_in,
            idle: block.users == 0,
        })
    }

    /// A block to write, for one user. Where none is free, the cached block that was used least recently loses its
    /// name.
    pub fn take(&mut self) -> Option<BlockId> {
        let index = if self.first_free != NONE {
            let index = self.first_free;
            self.first_free = self.blocks[index as usize].next;
            self.free -= 1;
            index
        } else if self.least_recent != NONE {
            let index = self.least_recent;
            self.unlink(index);
            if let Some(name) = self.blocks[index as usize].name.take() {
                self.by_name.remove(&name);
            }
            index
        } else {
            return None;
        };
        self.blocks[index as usize].users = 1;
        Some(BlockId(index))
    }

    /// One more user of a named block, who only reads it.
    ///
    /// # Panics
    /// When the block has no name: it may still be written.
    pub fn share(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block.0 as usize];
        assert!(entry.name.is_some(), "{block:?} has no name");
        entry.users += 1;
        if entry.users == 1 {
            self.unlink(block.0);
        }
    }

    /// Names a block that its one user has filled, or fills in the step `filled_in`, and never writes again. Where
    /// another block has the name, that one keeps it and nothing changes.
    ///
    /// # Panics
    /// When the block has a name, or is not used.
    pub fn publish(&mut self, block: BlockId, name: BlockHash, filled_in: u64) {
        let entry = &mut self.blocks[block.0 as usize];
        assert!(
            entry.users == 1 && entry.name.is_none(),
            "{block:?} is not one to name"
        );
        if let std::collections::hash_map::Entry::Vacant(vacant) = self.by_name.entry(name) {
            vacant.insert(block.0);
            entry.name = Some(name);
            entry.filled_in = filled_in;
        }
    }

    /// One user fewer. The last one leaves the block cached if it has a name, else free.
    ///
    /// # Panics
    /// When the block is not used.
    pub fn release(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block.0 as usize];
        assert!(entry.users > 0, "{block:?} is not used");
        entry.users -= 1;
        if entry.users > 0 {
            return;
        }
        if entry.name.is_some() {
            self.link_most_recent(block.0);
        } else {
            entry.next = self.first_free;
            self.first_free = block.0;
            self.free += 1;
        }
    }

    fn link_most_recent(&mut self, index: u32) {
        let last = self.most_recent;
        let entry = &mut self.blocks[index as usize];
        (entry.previous, entry.next) = (last, NONE);
        match last {
            NONE => self.least_recent = index,
            last => self.blocks[last as usize].next = index,
        }
        self.most_recent = index;
        self.cached += 1;
    }

    fn unlink(&mut self, index: u32) {
        let entry = &self.blocks[index as usize];
        let (previous, next) = (entry.previous, entry.next);
        match previous {
            NONE => self.least_recent = next,
            previous => self.blocks[previous as usize].next = next,
        }
        match next {
            NONE => self.most_recent = previous,
            next => self.blocks[next as usize].previous = previous,
        }
        self.cached -= 1;
    }
}
