use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::*;
use crate::executor::BLOCK_TOKENS;

fn name(n: u32) -> BlockHash {
    BlockHash::root(0, None).child(&[n; BLOCK_TOKENS])
}

#[test]
fn blocks_go_from_free_to_owned_to_cached_to_taken_again() {
    let mut pool = BlockPool::new(2);
    let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
    assert_eq!((pool.take(), pool.available()), (None, 0));
    pool.publish(a, name(1), 7);
    pool.release(a);
    assert_eq!((pool.available(), pool.cached()), (1, 1));
    let found = pool.find(&name(1)).unwrap();
    assert_eq!((found.block, found.filled_in, found.idle), (a, 7, true));

    pool.share(a);
    assert_eq!((pool.users(a), pool.take()), (1, None), "it is in use");
    pool.release(a);
    assert_eq!(pool.take(), Some(a), "what is cached makes place");
    assert_eq!(pool.find(&name(1)), None);
    pool.release(a);
    pool.release(b);
    assert_eq!((pool.available(), pool.cached()), (2, 0));
}

#[test]
fn a_name_that_is_taken_stays_with_its_block() {
    let mut pool = BlockPool::new(2);
    let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
    pool.publish(a, name(1), 1);
    pool.publish(b, name(1), 2);
    assert_eq!(pool.find(&name(1)).unwrap().block, a);
    pool.release(b);
    assert_eq!((pool.available(), pool.cached()), (1, 0));
}

#[test]
#[should_panic(expected = "has no name")]
fn a_block_that_may_be_written_is_not_shared() {
    let mut pool = BlockPool::new(1);
    let a = pool.take().unwrap();
    pool.share(a);
}

#[test]
#[should_panic(expected = "is not used")]
fn a_block_is_not_freed_twice() {
    let mut pool = BlockPool::new(1);
    let a = pool.take().unwrap();
    pool.release(a);
    pool.release(a);
}

/// What a pool should do, said with lists.
#[derive(Default)]
struct Naive {
    users: BTreeMap<BlockId, u32>,
    names: BTreeMap<BlockId, BlockHash>,
    cached: VecDeque<BlockId>,
}

#[derive(Clone, Debug)]
enum Action {
    Take,
    Share(u32),
    Publish(usize, u32),
    Release(usize),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => Just(Action::Take),
        2 => (0..6u32).prop_map(Action::Share),
        3 => (any::<usize>(), 0..6u32).prop_map(|(i, n)| Action::Publish(i, n)),
        4 => any::<usize>().prop_map(Action::Release),
    ]
}

impl Naive {
    fn find(&self, name: &BlockHash) -> Option<BlockId> {
        let mut found = self.names.iter().filter(|(_, n)| *n == name);
        let first = found.next().map(|(block, _)| *block);
        assert!(found.next().is_none(), "two blocks of one name");
        first
    }

    /// Does to both what `action` says; `held` are the uses, each of one user.
    fn step(&mut self, pool: &mut BlockPool, held: &mut Vec<BlockId>, action: &Action) {
        match *action {
            Action::Take => self.take(pool, held),
            Action::Share(n) => {
                let found = self.find(&name(n));
                assert_eq!(pool.find(&name(n)).map(|n| n.block), found);
                if let Some(block) = found {
                    pool.share(block);
                    self.cached.retain(|b| *b != block);
                    *self.users.entry(block).or_default() += 1;
                    held.push(block);
                }
            }
            Action::Publish(i, n) if !held.is_empty() => {
                let block = held[i % held.len()];
                if !self.names.contains_key(&block) {
                    pool.publish(block, name(n), 0);
                    if self.find(&name(n)).is_none() {
                        self.names.insert(block, name(n));
                    }
                }
            }
            Action::Release(i) if !held.is_empty() => {
                let block = held.swap_remove(i % held.len());
                pool.release(block);
                let users = self.users.get_mut(&block).unwrap();
                *users -= 1;
                if *users == 0 && self.names.contains_key(&block) {
                    self.cached.push_back(block);
                }
            }
            _ => {}
        }
    }

    fn take(&mut self, pool: &mut BlockPool, held: &mut Vec<BlockId>) {
        let idle = |b: &BlockId| self.users.get(b).is_none_or(|u| *u == 0);
        let free = (0..pool.total())
            .map(BlockId)
            .filter(|b| idle(b) && !self.cached.contains(b))
            .count();
        let taken = pool.take();
        match (taken, free) {
            (Some(block), 0) => {
                assert_eq!(self.cached.pop_front(), Some(block), "the least recent");
                self.names.remove(&block);
            }
            (Some(block), _) => assert!(idle(&block) && !self.cached.contains(&block)),
            (None, free) => assert!(free == 0 && self.cached.is_empty()),
        }
        if let Some(block) = taken {
            assert!(!held.contains(&block), "two owners of {block:?}");
            self.users.insert(block, 1);
            held.push(block);
        }
    }
}

proptest! {
    #[test]
    fn a_pool_is_what_lists_say(
        total in 1..8u32,
        actions in prop::collection::vec(action(), 0..200),
    ) {
        let (mut pool, mut naive, mut held) = (BlockPool::new(total), Naive::default(), vec![]);
        for action in &actions {
            naive.step(&mut pool, &mut held, action);
            for block in (0..total).map(BlockId) {
                let users = held.iter().filter(|b| **b == block).count() as u32;
                prop_assert_eq!(pool.users(block), users);
                prop_assert!(users <= 1 || naive.names.contains_key(&block), "shared without a name");
            }
            for n in 0..6 {
                prop_assert_eq!(pool.find(&name(n)).map(|n| n.block), naive.find(&name(n)));
            }
            let used: std::collections::BTreeSet<_> = held.iter().collect();
            prop_assert_eq!(pool.available() as usize, total as usize - used.len());
            prop_assert_eq!(pool.cached() as usize, naive.cached.len());
        }
        for block in held.drain(..) {
            pool.release(block);
        }
        prop_assert_eq!(pool.available(), total);
    }
}
