//! Finds the user whose process is at the other end of a loopback connection.
//!
//! The system lists each socket with its owner in `/proc/net/tcp`. The list is read before the first byte of a request.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use tokio::sync::Mutex;

use shardmill_core::private::uid;

/// Tables of the system's sockets.
const TABLES: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];
/// Administrator.
const ROOT: u32 = 0;

/// Owner of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// User.
    User(u32),
    /// None any more: the process has closed the socket.
    Gone,
}

/// Both ends of a connection.
type Ends = ((IpAddr, u16), (IpAddr, u16));
/// All sockets of this system, by their own end and the other end; `None` if the system does not list them.
type Sockets = Option<HashMap<Ends, Owner>>;

/// Last contents of the tables, and the time at which reading them began.
static LOOK: Mutex<Option<(Instant, Sockets)>> = Mutex::const_new(None);

/// Returns why a peer is refused; `None`: it is a process of this user or of root.
///
/// Reading the tables takes time in proportion to the sockets of the system. So one read serves all connections that
/// arrived before it began. A thousand lanes that connect at once, or an attacker who opens many connections, cost a
/// few reads, one at a time.
pub(super) async fn refusal(peer: SocketAddr, local: SocketAddr) -> Option<String> {
    let came = Instant::now();
    let mut look = LOOK.lock().await;
    if look.as_ref().is_none_or(|(begun, _)| *begun < came) {
        let begun = Instant::now();
        // A reading thread that fails finds no sockets, so that nobody is let in by mistake.
        let sockets = tokio::task::spawn_blocking(sockets).await.unwrap_or(Some(HashMap::new()));
        *look = Some((begun, sockets));
    }
    let owner = look.as_ref().and_then(|(_, sockets)| find(sockets, peer, local));
    decide(owner, uid())
}

fn decide(owner: Option<Owner>, own: u32) -> Option<String> {
    match owner {
        Some(Owner::User(user)) if user == own || user == ROOT => None,
        Some(Owner::User(user)) => Some(format!(
            "expected a process of user {own}, who owns this stream, found one of user {user}; start the stream \
             with --any-user to let in all users of this machine"
        )),
        Some(Owner::Gone) => Some("the client process has closed its connection".into()),
        // There is no such table on this system. All its users are let in, as the book says.
        None => None,
    }
}

/// Finds the owner of the socket whose own address is `peer` and whose other end is `local`; `None` if the system has
/// no table.
fn find(sockets: &Sockets, peer: SocketAddr, local: SocketAddr) -> Option<Owner> {
    let found = sockets.as_ref()?.get(&(plain(peer), plain(local)));
    Some(found.copied().unwrap_or(Owner::Gone))
}

/// Reads the tables of this system.
fn sockets() -> Sockets {
    let tables = TABLES.map(|path| std::fs::read_to_string(path).ok());
    if tables.iter().all(Option::is_none) {
        return None;
    }
    Some(tables.iter().flatten().flat_map(|table| sockets_in(table)).collect())
}

fn sockets_in(table: &str) -> impl Iterator<Item = (Ends, Owner)> {
    table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let ends = (address(fields.next()?)?, address(fields.next()?)?);
        // State, queues, timer and retransmissions come between.
        let user = fields.nth(4)?.parse().ok()?;
        let inode: u64 = fields.nth(1)?.parse().ok()?;
        // The system shows a socket without a process as one of root.
        Some((ends, if inode == 0 { Owner::Gone } else { Owner::User(user) }))
    })
}

fn plain(address: SocketAddr) -> (IpAddr, u16) {
    (address.ip().to_canonical(), address.port())
}

/// Parses an address of the table: hexadecimal 32-bit words in the byte order of this machine.
fn address(text: &str) -> Option<(IpAddr, u16)> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let digits = ip.get(at * 8..(at + 1) * 8)?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    let ip = match ip.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let octets: [u8; 16] = words.as_flattened().try_into().ok()?;
            IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()
        }
        _ => return None,
    };
    Some((ip, port))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[cfg(target_endian = "little")]
    #[test]
    fn wall_15_the_owner_of_a_socket_is_found_in_the_systems_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 5 1 0 100 0 0 10 0
   1: 0100007F:9C40 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1001        0 77 1 0 20 4 30 10 -1
   2: 0100007F:9C41 0100007F:1F90 06 00000000:00000000 03:00001000 00000000     0        0 0 3 0
   3: 0000000000000000FFFF00000100007F:9C42 0000000000000000FFFF00000100007F:1F90 01 00000000:00000000 00:00000000 00000000  1002        0 78 1 0 20 4 30 10 -1
";
        let server: SocketAddr = "127.0.0.1:8080".parse().expect("an address");
        let sockets = Some(sockets_in(table).collect());
        let owner = |port: u16| find(&sockets, ([127, 0, 0, 1], port).into(), server);
        assert_eq!(owner(0x9C40), Some(Owner::User(1001)));
        // A socket without a process looks like one of root.
        assert_eq!(owner(0x9C41), Some(Owner::Gone));
        assert_eq!(owner(0x9C42), Some(Owner::User(1002)));
        assert_eq!(owner(0x9C43), Some(Owner::Gone));
        let refused = |owner| decide(owner, 1001).is_some();
        assert!(!refused(Some(Owner::User(1001))) && !refused(Some(Owner::User(ROOT))));
        assert!(refused(Some(Owner::User(1002))) && refused(Some(Owner::Gone)));
        assert!(!refused(None));
    }

    #[test]
    fn wall_15_this_systems_table_names_this_user() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let client = TcpStream::connect(listener.local_addr().expect("an address")).expect("open");
        let (peer, local) =
            (client.local_addr().expect("an address"), client.peer_addr().expect("an address"));
        let expected = cfg!(target_os = "linux").then_some(Owner::User(uid()));
        assert_eq!(find(&sockets(), peer, local), expected);
    }
}
