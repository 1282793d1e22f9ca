//! Transport between processes over TCP, for ranks that were not started by MPI: torchrun, srun, or variables set by
//! hand.
//!
//! Rank 0 listens on `MASTER_ADDR:MASTER_PORT`. The other ranks send it the ports on which they listen, receive the
//! list of all ranks, and connect to the ranks below them. Connections that do not name this run are refused.
//!
//! A rank's address is the one from which it reached rank 0, so all connections use the network of `MASTER_ADDR`. Ranks on
//! the host of rank 0 may reach it by a loopback address, as where `/etc/hosts` gives the host's own name 127.0.1.1; the
//! others then get the address by which they reached rank 0 themselves.

use super::{
    launcher::Master,
    wait::{Lost, Wait},
};
use crate::{
    error::{Context, Result, ensure, failed, usage},
    runtime,
};
use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    thread,
    time::{Duration, Instant},
};

/// Connections to all other ranks, by rank.
pub struct Mesh(Vec<Option<TcpStream>>);

/// Start of the first message on a connection: these bytes, digests of the run and of the host's processors, the rank, and
/// the port on which it listens.
const HELLO: Digest = *b"vilg/1\0\0";
const GREETING: usize = 3 * size_of::<Digest>() + 4 + 2;

type Digest = [u8; 8];

/// Time limit for the first message on a new connection.
const INTRODUCTION: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);

/// A rank that has connected.
struct Guest {
    rank: usize,
    processors: Digest,
    /// The address on which it listens.
    address: SocketAddr,
    stream: TcpStream,
}

/// State of the rendezvous: what a rank needs to connect to the others.
struct Rendezvous {
    rank: usize,
    world_size: usize,
    /// Digest of the run's name and size.
    run: Digest,
    /// Digest of the host and of the processors of it that this rank may use.
    processors: Digest,
    listener: TcpListener,
    deadline: Instant,
}

impl Mesh {
    /// Connects to all other ranks; also returns the number of ranks that share this rank's processors, itself included:
    /// those of this host, unless the launcher gave each its own.
    pub fn connect(rank: usize, world_size: usize, master: &Master, patience: Duration) -> Result<(Self, usize)> {
        let port = if rank == 0 { master.port } else { 0 };
        let hint = "another run may be using this port; choose another MASTER_PORT";
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
            .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
            .map_err(|error| failed(format!("rank {rank} cannot listen on port {port}: {error}"), hint))?;
        listener.set_nonblocking(true)?;
        let run = digest(&format!("{}\n{world_size}", master.run));
        let processors = digest(&(runtime::host_identity() + &runtime::allowed_processors()));
        let deadline = Instant::now() + patience;
        let rendezvous = Rendezvous { rank, world_size, run, processors, listener, deadline };
        if rank == 0 { rendezvous.receive() } else { rendezvous.join(master) }
    }

    /// Sends `parts[r]` to rank r and fills `buffers[r]` with the message from rank r.
    pub fn exchange(&mut self, parts: &[&[u8]], buffers: Vec<&mut [u8]>, wait: &Wait) -> std::result::Result<(), Lost> {
        let streams = self.0.iter_mut().enumerate().filter_map(|(rank, stream)| Some((rank, stream.as_mut()?)));
        let mut buffers: Vec<Option<&mut [u8]>> = buffers.into_iter().map(Some).collect();
        let open = |(rank, stream)| Some(Open { rank, stream, out: parts[rank], into: buffers[rank].take()? });
        let mut open: Vec<Open> = streams.filter_map(open).collect();
        let mut moved = Instant::now();
        let begun = moved;
        loop {
            let mut gone = Vec::new();
            for other in &mut open {
                match other.step() {
                    Ok(true) => moved = Instant::now(),
                    Ok(false) => {}
                    Err(_) => gone.push(other.rank),
                }
            }
            if !gone.is_empty() {
                return Err(Lost::Gone(gone));
            }
            open.retain(|other| !(other.out.is_empty() && other.into.is_empty()));
            if open.is_empty() {
                return Ok(());
            }
            if begun.elapsed() > wait.patience {
                return Err(Lost::Late(open.iter().map(|other| other.rank).collect()));
            }
            wait.rest(moved.elapsed());
        }
    }
}

/// An incomplete exchange with one rank.
struct Open<'a> {
    rank: usize,
    stream: &'a mut TcpStream,
    out: &'a [u8],
    into: &'a mut [u8],
}

impl Open<'_> {
    /// Sends and receives what is possible without blocking; returns whether any bytes were transferred.
    fn step(&mut self) -> std::io::Result<bool> {
        let mut moved = false;
        while !self.out.is_empty() {
            match ready(self.stream.write(self.out))? {
                Some(count) => self.out = &self.out[count..],
                None => break,
            }
            moved = true;
        }
        while !self.into.is_empty() {
            match ready(self.stream.read(self.into))? {
                Some(count) => self.into = &mut std::mem::take(&mut self.into)[count..],
                None => break,
            }
            moved = true;
        }
        Ok(moved)
    }
}

/// `None` if the operation would block.
fn ready(result: std::io::Result<usize>) -> std::io::Result<Option<usize>> {
    match result {
        Ok(0) => Err(ErrorKind::ConnectionReset.into()),
        Ok(count) => Ok(Some(count)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Rendezvous {
    /// Rank 0: waits for all other ranks and sends each the list of all ranks.
    fn receive(self) -> Result<(Mesh, usize)> {
        let guests = self.guests(1..self.world_size)?;
        let own = (self.listener.local_addr()?, self.processors);
        let mut told: Vec<_> =
            [own].into_iter().chain(guests.iter().map(|guest| (guest.address, guest.processors))).collect();
        let outside = guests.iter().find(|guest| !guest.address.ip().is_loopback());
        if let Some(guest) = outside {
            let reached = guest.stream.local_addr()?.ip().to_canonical();
            name_loopback(told.iter_mut().map(|(address, _)| address), reached);
        }
        let text = serde_json::to_vec(&told)?;
        let mut streams = vec![None];
        for Guest { mut stream, .. } in guests {
            stream.write_all(&(text.len() as u32).to_le_bytes())?;
            stream.write_all(&text)?;
            streams.push(Some(stream));
        }
        self.mesh(streams, &told)
    }

    /// Other ranks: receives the list from rank 0, connects to the ranks below it and waits for those above it.
    fn join(self, master: &Master) -> Result<(Mesh, usize)> {
        const ENTRY: usize = 200;
        let host = master.host.trim_start_matches('[').trim_end_matches(']');
        let mut first = self.reach(&(host, master.port), &format!("{host} port {}", master.port), 0)?;
        let mut length = [0; 4];
        first
            .read_exact(&mut length)
            .with_context(|| format!("rank {} received no list of ranks from rank 0", self.rank))?;
        let length = u32::from_le_bytes(length) as usize;
        ensure!(length <= ENTRY * self.world_size, "the list of ranks from rank 0 is {length} bytes long");
        let mut text = vec![0; length];
        first
            .read_exact(&mut text)
            .with_context(|| format!("rank {} received an incomplete list of ranks from rank 0", self.rank))?;
        let all: Vec<(SocketAddr, Digest)> =
            serde_json::from_slice(&text).context("cannot parse the list of ranks from rank 0")?;
        ensure!(all.len() == self.world_size, "the list of ranks from rank 0 has {} entries", all.len());
        let mut streams = vec![Some(first)];
        for (rank, (address, _)) in all.iter().enumerate().take(self.rank).skip(1) {
            streams.push(Some(self.reach(address, &address.to_string(), rank)?));
        }
        streams.push(None);
        streams.extend(self.guests(self.rank + 1..self.world_size)?.into_iter().map(|guest| Some(guest.stream)));
        self.mesh(streams, &all)
    }

    /// Connects to a rank by the first of its addresses that answers, and sends the greeting of this one.
    fn reach(&self, address: &impl ToSocketAddrs, shown: &str, rank: usize) -> Result<TcpStream> {
        let connect = || {
            let mut last = ErrorKind::AddrNotAvailable.into();
            for address in address.to_socket_addrs()? {
                match TcpStream::connect_timeout(&address, INTRODUCTION) {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = error,
                }
            }
            Err::<_, std::io::Error>(last)
        };
        loop {
            match connect() {
                Ok(mut stream) => {
                    stream.set_read_timeout(Some(self.left()))?;
                    stream.write_all(&self.greeting()?)?;
                    return Ok(stream);
                }
                Err(error) if self.deadline <= Instant::now() => {
                    let hint =
                        "check that MASTER_ADDR is the host of rank 0 and that the hosts can connect to each other";
                    let what = format!("rank {} cannot reach rank {rank} at {shown}: {error}", self.rank);
                    return Err(failed(what, hint));
                }
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }

    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now()).max(PAUSE)
    }

    fn greeting(&self) -> Result<Vec<u8>> {
        let mut bytes = [HELLO, self.run, self.processors].concat();
        bytes.extend(u32::try_from(self.rank)?.to_le_bytes());
        bytes.extend(self.listener.local_addr()?.port().to_le_bytes());
        Ok(bytes)
    }

    /// Waits until all of `ranks` have connected; returns them in order.
    fn guests(&self, ranks: std::ops::Range<usize>) -> Result<Vec<Guest>> {
        let mut guests: Vec<Option<Guest>> = ranks.clone().map(|_| None).collect();
        while guests.iter().any(Option::is_none) {
            match self.listener.accept() {
                Ok((stream, from)) => {
                    let Some(guest) = self.introduced(stream, from.ip()) else { continue };
                    let seat = guest.rank.checked_sub(ranks.start).and_then(|i| guests.get_mut(i));
                    let (rank, what) = (guest.rank, "two processes have rank");
                    let hint = "start each rank once, and give every run its own MASTER_PORT";
                    match seat {
                        Some(seat) if seat.is_none() => *seat = Some(guest),
                        _ => return Err(usage(format!("{what} {rank}"), hint)),
                    }
                }
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error.into()),
                Err(_) if self.deadline <= Instant::now() => {
                    let missing = ranks.clone().zip(&guests).filter(|(_, guest)| guest.is_none());
                    let missing: Vec<String> = missing.map(|(rank, _)| rank.to_string()).collect();
                    let what = format!("rank {} waited in vain for ranks {}", self.rank, missing.join(", "));
                    return Err(failed(
                        what,
                        "check that all ranks were started, with the same MASTER_ADDR and WORLD_SIZE",
                    ));
                }
                Err(_) => thread::sleep(PAUSE),
            }
        }
        Ok(guests.into_iter().flatten().collect())
    }

    /// The mesh of these connections, and the number of ranks that share this rank's processors.
    fn mesh(&self, streams: Vec<Option<TcpStream>>, all: &[(SocketAddr, Digest)]) -> Result<(Mesh, usize)> {
        for stream in streams.iter().flatten() {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
        }
        Ok((Mesh(streams), all.iter().filter(|(_, processors)| *processors == self.processors).count().max(1)))
    }

    /// Reads the greeting of a new connection; `None` if it is not from this run.
    fn introduced(&self, mut stream: TcpStream, from: IpAddr) -> Option<Guest> {
        stream.set_nonblocking(false).ok()?;
        stream.set_read_timeout(Some(INTRODUCTION)).ok()?;
        let mut said = [0; GREETING];
        stream.read_exact(&mut said).ok()?;
        let rest = said.strip_prefix(&HELLO)?.strip_prefix(&self.run)?;
        let (processors, rest) = rest.split_first_chunk()?;
        let (rank, port) = (rest.first_chunk()?, rest.last_chunk()?);
        let address = SocketAddr::new(from.to_canonical(), u16::from_le_bytes(*port));
        Some(Guest { rank: u32::from_le_bytes(*rank) as usize, processors: *processors, address, stream })
    }
}

/// Replaces loopback addresses by `host`, keeping their ports.
fn name_loopback<'a>(addresses: impl Iterator<Item = &'a mut SocketAddr>, host: IpAddr) {
    addresses.filter(|address| address.ip().is_loopback()).for_each(|address| address.set_ip(host));
}

fn digest(text: &str) -> Digest {
    let mut digest = Digest::default();
    blake3::Hasher::new().update(text.as_bytes()).finalize_xof().fill(&mut digest);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_meet_by_either_version_of_ip() {
        for host in ["127.0.0.1", "::1", "[::1]", "localhost"] {
            if (host.trim_matches(['[', ']']), 0)
                .to_socket_addrs()
                .and_then(|found| TcpListener::bind(&*found.collect::<Vec<_>>()))
                .is_err()
            {
                continue; // a host without IPv6
            }
            let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
            let master = Master { host: host.into(), port, run: "versions".into() };
            let meet = |rank| Mesh::connect(rank, 3, &master, Duration::from_secs(20)).unwrap();
            let sharing = thread::scope(|scope| {
                let ranks = [0, 1, 2].map(|rank| scope.spawn(move || meet(rank)));
                ranks.map(|rank| rank.join().unwrap().1)
            });
            assert_eq!(sharing, [3, 3, 3], "{host}");
        }
    }

    #[test]
    fn loopback_addresses_are_not_handed_to_other_hosts() {
        let mut addresses = ["127.0.1.1:7000", "[::1]:7001", "10.0.0.2:7002"].map(|text| text.parse().unwrap());
        name_loopback(addresses.iter_mut(), "10.0.0.1".parse().unwrap());
        assert_eq!(addresses.map(|address| address.to_string()), ["10.0.0.1:7000", "10.0.0.1:7001", "10.0.0.2:7002"]);
    }
}
