//! One answer and no other: its ids are given, and what is wanted of it is how likely each of them was.

use std::sync::Arc;

use super::{Constraint, GrammarError};

/// An answer of these ids.
pub struct Exactly {
    ids: Vec<u32>,
    /// How many of them came.
    came: usize,
}

impl Exactly {
    /// Allows `ids` in their order and nothing else.
    pub fn new(ids: Vec<u32>) -> Self {
        Self { ids, came: 0 }
    }

    fn next(&self) -> Result<u32, GrammarError> {
        let over = || GrammarError::Run {
            reason: format!("all {} ids of the answer came", self.ids.len()),
        };
        self.ids.get(self.came).copied().ok_or_else(over)
    }
}

impl Constraint for Exactly {
    fn allowed(&mut self) -> Result<Arc<[u32]>, GrammarError> {
        let id = self.next()? as usize;
        let mut words = vec![0; id / 32 + 1];
        words[id / 32] = 1 << (id % 32);
        Ok(words.into())
    }

    fn push(&mut self, id: u32) -> Result<(), GrammarError> {
        let wanted = self.next()?;
        if id != wanted {
            let reason = format!("{wanted} must come, got {id}");
            return Err(GrammarError::Run { reason });
        }
        self.came += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_id_may_come_at_a_time() {
        let mut answer = Exactly::new(vec![0, 70]);
        assert_eq!(&*answer.allowed().unwrap(), [1]);
        answer.push(0).unwrap();
        assert_eq!(&*answer.allowed().unwrap(), [0, 0, 1 << 6]);
        assert!(answer.push(71).is_err());
        answer.push(70).unwrap();
        assert!(answer.allowed().is_err() && answer.push(70).is_err());
    }
}
