//! `espalier watch` without a batch, and `espalier top`: the whole system as it is now, across all coordinators, look after
//! look.
//!
//! [`look`] asks, [`rates`] derives what two looks say of the time between them, [`parts`] makes tables of both, [`screen`]
//! lays them out in a given width and height as a [`view`] chooses, `keys` change that, and `terminal` draws. This module
//! goes round: it decides when to look, where it is shown, and what becomes of a coordinator that goes away.

mod keys;
mod look;
mod parts;
mod rates;
mod screen;
mod table;
mod terminal;
mod view;

use std::future::Future;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use super::{Away, Watch};
use crate::client::{Client, root_cause};
use crate::context::Context;
use crate::exit::{Exit, Outcome};
use crate::output::{note, plain};
use keys::Keys;
use look::Look;
use rates::{History, Rates};
use terminal::Terminal;
use view::{Key, View};

/// Time between two looks on a terminal and as JSON.
const EVERY: Duration = Duration::from_secs(1);
/// Time between two blocks of text where there is no terminal.
const BLOCK_EVERY: Duration = Duration::from_secs(5);
/// Width of a block of text where there is no terminal: names are not cut.
const BLOCK_COLUMNS: usize = 1_000;
/// Lines of such a block at most.
const BLOCK_ROWS: usize = 10_000;

/// Watches without keys.
pub async fn run(context: &Context, args: &Watch) -> Outcome {
    let mut client = context.operator().await?;
    if args.once {
        let look = look::take(&client).await?;
        show(context, &look, &Rates::default())?;
        return Ok(Exit::Ok);
    }
    let screen = match context.out.json {
        true => None,
        false => Terminal::open(false),
    };
    let default = match context.out.json || screen.is_some() {
        true => EVERY,
        false => BLOCK_EVERY,
    };
    let every = args.every.map_or(default, Duration::from_secs);
    Going::new(screen, None)?
        .on(context, &mut client, every)
        .await
}

/// Watches with keys; where there is no terminal for them, or `once`, two looks a second apart are one frame.
pub async fn top(context: &Context, once: bool, every_s: u64) -> Outcome {
    let mut client = context.operator().await?;
    if once || context.out.json || !terminal::is_there() {
        return frame(context, &client).await;
    }
    // The keys before the screen, so that a fault of theirs is not shown on its second page.
    let keys = Keys::open()?;
    let every = Duration::from_secs(every_s);
    let screen = Terminal::open(true);
    Going::new(screen, keys)?
        .on(context, &mut client, every)
        .await
}

/// One frame, with the rates of a second.
async fn frame(context: &Context, client: &Client) -> Outcome {
    let before = look::take(client).await?;
    tokio::time::sleep_until(before.at + EVERY).await;
    let look = look::take(client).await?;
    let rates = Rates::between(&before, &look);
    let columns = terminal::columns().unwrap_or(BLOCK_COLUMNS);
    let lines = || screen::lay_out_view(&look, &rates, &View::default(), columns, BLOCK_ROWS);
    context
        .out
        .show(|| look.to_json(&rates), || lines().join("\n"))?;
    Ok(Exit::Ok)
}

/// Looks one after the other, until somebody wants an end.
struct Going {
    signals: Signals,
    keys: Option<Keys>,
    screen: Option<Terminal>,
}

impl Going {
    fn new(screen: Option<Terminal>, keys: Option<Keys>) -> std::io::Result<Self> {
        Ok(Self {
            signals: Signals::listen()?,
            keys,
            screen,
        })
    }

    /// Goes on, a look `every` so long.
    async fn on(mut self, context: &Context, client: &mut Client, every: Duration) -> Outcome {
        let (mut history, mut away) = (History::default(), Away::default());
        loop {
            let began = Instant::now();
            let Some(looked) = self.until(look::take(client)).await? else {
                return Ok(Exit::Ok);
            };
            let next = match looked {
                Ok(look) => {
                    away = Away::default();
                    let rates = history.add(look.clone());
                    match &mut self.screen {
                        Some(screen) => screen.show(Some((&look, &rates)), "")?,
                        None => show(context, &look, &rates)?,
                    }
                    began + every
                }
                Err(status) => {
                    let wait = away.after(status.clone())?;
                    let said = plain(&format!(
                        "connection lost, trying again: {}",
                        root_cause(&status)
                    ));
                    match &mut self.screen {
                        Some(screen) => screen.show(None, &said)?,
                        None => note(said),
                    }
                    Instant::now() + wait
                }
            };
            if self.until(tokio::time::sleep_until(next)).await?.is_none() {
                return Ok(Exit::Ok);
            }
            if away.is_noted() {
                match self.until(reconnect(context)).await? {
                    Some(fresh) => *client = fresh.unwrap_or_else(|| client.clone()),
                    None => return Ok(Exit::Ok),
                }
            }
        }
    }

    /// Waits for `future`, and meanwhile does what keys and signals ask for. None: somebody wants an end.
    async fn until<T>(&mut self, future: impl Future<Output = T>) -> std::io::Result<Option<T>> {
        let mut future = std::pin::pin!(future);
        loop {
            let said = tokio::select! {
                done = &mut future => return Ok(Some(done)),
                said = self.signals.next() => said,
                key = next_key(&mut self.keys) => Said::Pressed(key?),
            };
            match (said, &mut self.screen) {
                (Said::End, _) => return Ok(None),
                (Said::Resized, Some(screen)) => screen.draw()?,
                (Said::Pressed(key), Some(screen)) => {
                    if !screen.press(key)? {
                        return Ok(None);
                    }
                }
                (Said::Resized | Said::Pressed(_), None) => {}
            }
        }
    }
}

/// The next key; for ever where there are none.
async fn next_key(keys: &mut Option<Keys>) -> std::io::Result<Key> {
    match keys {
        Some(keys) => keys.next().await,
        None => std::future::pending().await,
    }
}

/// An `up` that was started again may listen elsewhere, and of several coordinators another one may answer.
async fn reconnect(context: &Context) -> Option<Client> {
    context.operator().await.ok()
}

/// A look where there is no terminal to draw on, or none is wanted.
fn show(context: &Context, look: &Look, rates: &Rates) -> std::io::Result<()> {
    if context.out.json {
        return context.out.event(&look.to_json(rates));
    }
    let columns = terminal::columns().unwrap_or(BLOCK_COLUMNS);
    let lines = screen::lay_out(look, rates, columns, BLOCK_ROWS);
    context.out.line(lines.join("\n") + "\n")
}

/// What a signal means here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    /// Somebody wants an end.
    End,
    /// The terminal has another size.
    Resized,
    /// A key was pressed.
    Pressed(Key),
}

/// What ends the view or changes its size.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    resized: Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            resized: signal(SignalKind::window_change())?,
        })
    }

    /// What comes next. Cancel-safe.
    async fn next(&mut self) -> Said {
        tokio::select! {
            _ = self.interrupt.recv() => Said::End,
            _ = self.terminate.recv() => Said::End,
            _ = self.resized.recv() => Said::Resized,
        }
    }
}
