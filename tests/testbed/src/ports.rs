//! Ports for servers that have to be told theirs, and that come back to the same ones after a restart.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

/// Ports of one block. The last is held open as long as the block is, which tells every other test, in whatever
/// process, that the block is taken.
const BLOCK: u16 = 10;
/// Every port and the port 10,000 above it, which SeaweedFS and Redis Cluster open too, lie below those that the
/// kernel gives to outgoing connections, so that no connection takes a port whose server is down for a moment.
const FIRST: u16 = 12_000;
const END: u16 = 22_500;
/// What SeaweedFS and Redis Cluster add to a port for their own traffic.
const TWIN_OFFSET: u16 = 10_000;

/// A block of loopback ports that nobody else's test uses while this lives.
#[derive(Debug)]
pub struct Ports {
    base: u16,
    _claim: TcpListener,
}

impl Ports {
    /// Claims a block whose ports, and the ports 10,000 above them, are free.
    ///
    /// # Panics
    /// Where there is none: hundreds of servers are running, or were left behind.
    pub fn claim() -> Self {
        let blocks = usize::from((END - FIRST) / BLOCK);
        // Processes begin at different places, so that they rarely try the same blocks.
        let begin = std::process::id() as usize * 37;
        (0..blocks)
            .map(|n| FIRST + BLOCK * u16::try_from((begin + n) % blocks).unwrap_or(0))
            .find_map(Self::claim_block)
            .expect("a free block of ports between 12000 and 22500")
    }

    fn claim_block(base: u16) -> Option<Self> {
        let claim = listen(base + BLOCK - 1)?;
        let free = (0..BLOCK - 1)
            .map(|n| base + n)
            .all(|port| listen(port).is_some() && listen(port + TWIN_OFFSET).is_some());
        free.then_some(Self {
            base,
            _claim: claim,
        })
    }

    /// The `n`th port of the block, `n` below 9.
    pub fn port(&self, n: u16) -> u16 {
        assert!(n < BLOCK - 1, "a block has {} ports, not {n}", BLOCK - 1);
        self.base + n
    }

    /// The same with the loopback address.
    pub fn address(&self, n: u16) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port(n)).into()
    }
}

fn listen(port: u16) -> Option<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_claimed_once_and_given_back() {
        let first = Ports::claim();
        let second = Ports::claim();
        assert_ne!(first.port(0), second.port(0));
        let base = first.port(0);
        assert!(Ports::claim_block(base).is_none());
        drop(first);
        assert!(Ports::claim_block(base).is_some());
    }

    #[test]
    fn a_block_with_a_port_in_use_is_left_alone() {
        let block = Ports::claim();
        let base = block.port(0);
        drop(block);
        let _server = listen(base + 3 + TWIN_OFFSET).unwrap();
        assert!(Ports::claim_block(base).is_none());
    }
}
