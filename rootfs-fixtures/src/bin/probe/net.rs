//! The smallest servers and client that a network test needs: HTTP/1.1 with one request per
//! connection, and TCP echo. Never more than that.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::time::Duration;

/// Both families where the kernel has IPv6, else IPv4.
fn listen(port: u16) -> std::io::Result<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind(("0.0.0.0", port)))
}

pub fn serve(port: u16, text: Option<&str>) -> anyhow::Result<()> {
    let listener = listen(port)?;
    super::print(&format!("serving on {port}\n"))?;
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let text = text.map(str::to_owned);
        std::thread::spawn(move || answer(stream, text.as_deref()));
    }
    Ok(())
}

fn answer(mut stream: TcpStream, text: Option<&str>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    (&mut reader).take(8192).read_line(&mut request)?;
    let mut header = String::new();
    while (&mut reader).take(8192).read_line(&mut header)? > 2 {
        header.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or("/");
    let body = match (path, text) {
        ("/show", _) => format!("{:#}\n", super::show::everything(&[])),
        ("/peer", _) => format!("{}\n", stream.peer_addr()?.ip()),
        (_, Some(text)) => format!("{text}\n"),
        (_, None) => format!("probe {} {path}\n", super::show::hostname()),
    };
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

pub fn fetch(host: &str, port: u16, path: &str) -> anyhow::Result<u8> {
    let mut stream = TcpStream::connect((host, port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    super::print(body)?;
    Ok(u8::from(!head.starts_with("HTTP/1.1 200")))
}

pub fn echo(port: u16) -> anyhow::Result<()> {
    let listener = listen(port)?;
    super::print(&format!("echo on {port}\n"))?;
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        std::thread::spawn(move || -> std::io::Result<()> {
            let mut back = stream.try_clone()?;
            std::io::copy(&mut stream, &mut back)?;
            back.shutdown(std::net::Shutdown::Write)
        });
    }
    Ok(())
}
