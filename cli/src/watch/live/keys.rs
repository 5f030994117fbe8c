//! The keys of a terminal, as they are pressed.

use std::collections::VecDeque;
use std::io::{self, IsTerminal as _, Stdin, stdin};
use std::time::Duration;

use rustix::termios::{
    LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr,
};

use super::view::{self, Key};

/// Bytes that are read at once: more than a person types.
const READ_BYTES: usize = 256;
/// How often the terminal is looked at: nobody sees a key that waits for so long. A thread that waited for it instead would
/// keep the process from its end until the next key.
const LOOK_EVERY: Duration = Duration::from_millis(30);

/// A terminal that gives each key at once and shows none. Dropping it gives the terminal back as it was.
#[derive(Debug)]
pub struct Keys {
    terminal: Stdin,
    before: Termios,
    pressed: VecDeque<Key>,
}

impl Keys {
    /// Takes the terminal of standard input; none where that is none.
    ///
    /// # Errors
    /// The terminal takes no other mode.
    pub fn open() -> io::Result<Option<Self>> {
        let terminal = stdin();
        if !terminal.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&terminal)?;
        let mut modes = before.clone();
        // Signals stay: Ctrl-C ends the command as it does everywhere.
        modes
            .local_modes
            .remove(LocalModes::ICANON | LocalModes::ECHO);
        // A read gives what is there and never waits.
        modes.special_codes[SpecialCodeIndex::VMIN] = 0;
        modes.special_codes[SpecialCodeIndex::VTIME] = 0;
        tcsetattr(&terminal, OptionalActions::Now, &modes)?;
        Ok(Some(Self {
            terminal,
            before,
            pressed: VecDeque::new(),
        }))
    }

    /// The next key. Cancel-safe.
    ///
    /// # Errors
    /// The terminal is gone.
    pub async fn next(&mut self) -> io::Result<Key> {
        loop {
            if let Some(key) = self.pressed.pop_front() {
                return Ok(key);
            }
            let mut bytes = [0; READ_BYTES];
            let read = rustix::io::read(&self.terminal, &mut bytes)?;
            self.pressed.extend(view::keys(&bytes[..read]));
            if read == 0 {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        // Nobody is left to be told.
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}
