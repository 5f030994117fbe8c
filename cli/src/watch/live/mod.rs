//! `espalier watch` without a batch: the whole system as it is now, across all coordinators, look after look.
//!
//! [`look`] asks, [`rates`] derives what two looks say of the time between them, [`screen`] lays a look out in a given
//! width and height, and `terminal` draws. This module goes round: it decides when to look, where it is shown, and what
//! becomes of a coordinator that goes away.

mod look;
mod rates;
mod screen;
mod terminal;

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use super::{Away, Watch};
use crate::client::{Client, root_cause};
use crate::context::Context;
use crate::exit::{Exit, Outcome};
use crate::output::{note, plain};
use look::Look;
use rates::{History, Rates};
use terminal::Terminal;

/// Time between two looks on a terminal and as JSON.
const EVERY: Duration = Duration::from_secs(1);
/// Time between two blocks of text where there is no terminal.
const BLOCK_EVERY: Duration = Duration::from_secs(5);
/// Width of a block of text where there is no terminal: names are not cut.
const BLOCK_COLUMNS: usize = 1_000;
/// Lines of such a block at most.
const BLOCK_ROWS: usize = 10_000;

/// Runs the command.
pub async fn run(context: &Context, args: &Watch) -> Outcome {
    let mut client = context.operator().await?;
    if args.once {
        let look = look::take(&client).await?;
        show(context, &look, &Rates::default())?;
        return Ok(Exit::Ok);
    }
    let mut signals = Signals::listen()?;
    let mut screen = match context.out.json {
        true => None,
        false => Terminal::open(),
    };
    let default = match context.out.json || screen.is_some() {
        true => EVERY,
        false => BLOCK_EVERY,
    };
    let every = args.every.map_or(default, Duration::from_secs);
    let (mut history, mut away) = (History::default(), Away::default());
    loop {
        let began = Instant::now();
        let looked = tokio::select! {
            looked = look::take(&client) => looked,
            () = signals.ended() => return Ok(Exit::Ok),
        };
        let until = match looked {
            Ok(look) => {
                away = Away::default();
                let rates = history.add(look.clone());
                match &mut screen {
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
                match &mut screen {
                    Some(screen) => screen.show(None, &said)?,
                    None => note(said),
                }
                Instant::now() + wait
            }
        };
        if pause(&mut signals, &screen, until).await? {
            return Ok(Exit::Ok);
        }
        if away.is_noted() {
            tokio::select! {
                fresh = reconnect(context) => client = fresh.unwrap_or(client),
                () = signals.ended() => return Ok(Exit::Ok),
            }
        }
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

/// Waits for the next look, and draws anew where the terminal changes its size. True: somebody wants an end.
async fn pause(
    signals: &mut Signals,
    screen: &Option<Terminal>,
    until: Instant,
) -> std::io::Result<bool> {
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(until) => return Ok(false),
            signal = signals.next() => match (signal, &screen) {
                (Said::End, _) => return Ok(true),
                (Said::Resized, Some(screen)) => screen.draw()?,
                (Said::Resized, None) => {}
            },
        }
    }
}

/// What a signal means here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    /// Somebody wants an end.
    End,
    /// The terminal has another size.
    Resized,
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

    /// Waits until somebody wants an end. Cancel-safe.
    async fn ended(&mut self) {
        while self.next().await != Said::End {}
    }
}
