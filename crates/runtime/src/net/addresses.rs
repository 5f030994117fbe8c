//! The addresses of one service that runs several times over: a list, names behind which there are several machines, or
//! both. Who connects takes one at random and, after a failure, one that was not tried yet.
//!
//! It does not balance single calls and keeps no connections; worker loop and command line do that.

use std::fmt;
use std::net::SocketAddr;

use serde::Deserialize;
use tonic::transport::Uri;

use super::NetError;

/// Most addresses in a list: more stand behind one name.
const ADDRESSES_MAX: usize = 64;
/// Most machines that are told apart; of a larger service any part serves as well.
const PLACES_MAX: usize = 256;

/// One or more addresses, such as `http://a:7411`. In a configuration: a text with commas between them, or a list.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub struct Addresses(Vec<String>);

/// How addresses are written.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Text(String),
    List(Vec<String>),
}

impl TryFrom<Written> for Addresses {
    type Error = NetError;

    fn try_from(written: Written) -> Result<Self, NetError> {
        match written {
            Written::Text(text) => Self::parse(&text),
            Written::List(list) => Self::parse(&list.join(",")),
        }
    }
}

impl Addresses {
    /// Reads addresses with commas between them. Each must be `http://host:port` or `https://host:port`.
    pub fn parse(text: &str) -> Result<Self, NetError> {
        let mut addresses: Vec<String> = Vec::new();
        for address in text.split(',').map(str::trim) {
            host_and_port(address)?;
            if !addresses.iter().any(|known| known == address) {
                addresses.push(address.to_owned());
            }
        }
        if addresses.len() > ADDRESSES_MAX {
            return Err(NetError::TooMany {
                addresses: addresses.len(),
                max: ADDRESSES_MAX,
            });
        }
        Ok(Self(addresses))
    }

    /// The one address `http://at`.
    pub fn of(at: SocketAddr) -> Self {
        Self(vec![format!("http://{at}")])
    }

    /// The addresses as they are written, without repetitions.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// Looks up every name, and says where the service is now. A name that is not known costs the others nothing.
    ///
    /// # Errors
    /// No name is known.
    pub async fn resolve(&self) -> Result<Vec<Place>, NetError> {
        let mut places = Vec::new();
        let mut unknown = None;
        for address in &self.0 {
            match resolve_one(address).await {
                Ok(found) => places.extend(found),
                Err(error) => unknown = unknown.or(Some(error)),
            }
        }
        places.truncate(PLACES_MAX);
        match unknown {
            Some(error) if places.is_empty() => Err(error),
            _ => Ok(places),
        }
    }
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

/// One machine behind an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The address, whose name the other side's certificate has to carry.
    pub(super) address: String,
    /// Where it leads.
    pub(super) at: SocketAddr,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.address.ends_with(&format!("//{}", self.at)) {
            return f.write_str(&self.address);
        }
        write!(f, "{} ({})", self.address, self.at)
    }
}

/// The place to go to next: any that is not among `tried`, or any at all where every one is. `random` is in [0, 1).
pub fn choose<'a>(places: &'a [Place], tried: &[Place], random: f64) -> Option<&'a Place> {
    let fresh: Vec<&Place> = places.iter().filter(|p| !tried.contains(p)).collect();
    let from = match fresh.is_empty() {
        true => places.iter().collect(),
        false => fresh,
    };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the product lies between 0 and the number of places"
    )]
    let n = (random * from.len() as f64) as usize;
    from.get(n.min(from.len().saturating_sub(1))).copied()
}

async fn resolve_one(address: &str) -> Result<Vec<Place>, NetError> {
    let (host, port) = host_and_port(address)?;
    let found = tokio::net::lookup_host((host.as_str(), port)).await;
    let found = found.map_err(|source| NetError::Unknown {
        host: host.clone(),
        source,
    })?;
    let place = |at| Place {
        address: address.to_owned(),
        at,
    };
    Ok(found.map(place).collect())
}

/// The parts of an address. A host in brackets, as IPv6 is written, comes without them.
pub(super) fn host_and_port(address: &str) -> Result<(String, u16), NetError> {
    let refuse = || NetError::Endpoint {
        endpoint: address.to_owned(),
        source: None,
    };
    let uri: Uri = address.parse().map_err(|_| refuse())?;
    let standard = match uri.scheme_str() {
        Some("http") => 80,
        Some("https") => 443,
        _ => return Err(refuse()),
    };
    let host = uri.host().ok_or_else(refuse)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok((host.to_owned(), uri.port_u16().unwrap_or(standard)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(n: u8) -> Place {
        Place {
            address: "http://name:1".to_owned(),
            at: SocketAddr::from(([127, 0, 0, n], 1)),
        }
    }

    #[test]
    fn addresses_are_a_text_or_a_list() {
        #[derive(Deserialize)]
        struct Config {
            url: Addresses,
        }
        let read = |text: &str| toml::from_str::<Config>(text).map(|config| config.url.to_string());
        assert_eq!(read("url = 'http://a:1'").unwrap(), "http://a:1");
        let both = "http://a:1,https://[::1]:2";
        assert_eq!(
            read("url = 'http://a:1, https://[::1]:2,http://a:1'").unwrap(),
            both
        );
        assert_eq!(
            read("url = ['http://a:1', 'https://[::1]:2']").unwrap(),
            both
        );
        for bad in ["''", "[]", "'http://a:1,'", "'a:1'", "'ftp://a:1'"] {
            let error = read(&format!("url = {bad}")).unwrap_err().to_string();
            assert!(error.contains("must be `http://host:port`"), "{error}");
        }
        let many: Vec<String> = (0..65).map(|n| format!("http://a{n}:1")).collect();
        assert!(Addresses::parse(&many.join(",")).is_err());
    }

    #[test]
    fn the_next_place_is_random_and_not_one_that_failed() {
        let places = [place(1), place(2), place(3)];
        let first = |random| choose(&places, &[], random).unwrap().clone();
        assert_eq!(
            [first(0.0), first(0.5), first(0.99)],
            [place(1), place(2), place(3)]
        );
        for random in [0.0, 0.5, 0.99] {
            let next = choose(&places, &[place(1), place(3)], random);
            assert_eq!(next, Some(&place(2)));
        }
        assert_eq!(
            choose(&places[..1], &[place(1)], 0.3),
            Some(&place(1)),
            "one that failed is better than none"
        );
        assert_eq!(choose(&[], &[], 0.3), None);
    }

    #[tokio::test]
    async fn names_that_nobody_knows_cost_the_others_nothing() {
        let addresses = Addresses::parse("http://name.invalid:1,http://127.0.0.1:2").unwrap();
        let places = addresses.resolve().await.unwrap();
        assert_eq!(places.len(), 1);
        assert_eq!(places[0].to_string(), "http://127.0.0.1:2");
        let none = Addresses::parse("http://name.invalid:1").unwrap();
        let error = none.resolve().await.unwrap_err();
        assert!(error.to_string().contains("`name.invalid`"), "{error}");
    }
}
