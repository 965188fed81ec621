//! Finds the embedded stream that another process of this user serves, by an address file in the state folder.
//!
//! A port may belong to another user as soon as its process has ended, so an address alone proves nothing. The serving
//! process has a lock on its address file for as long as it runs; a locked file at the path means that it still serves.
//! The mark of the file tells it from that of a later process.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use shardmill_core::private::{self, FileMark};
use url::Url;

/// Folder below the state folder for the files of a served stream.
pub const FOLDER: &str = "stream";

/// Returns the path of the file with the address of a stream that is served from this state folder.
pub fn address_path(state_dir: &Path) -> PathBuf {
    state_dir.join(FOLDER).join("address")
}

/// An embedded stream that another process of this user serves.
#[derive(Clone, Debug)]
pub struct Served {
    url: Url,
    /// Path of the address file.
    path: PathBuf,
}

impl Deref for Served {
    type Target = Url;

    fn deref(&self) -> &Url {
        &self.url
    }
}

impl Served {
    /// Returns a mark of the process that serves at the address now; `None`: no process of this user does. `known` is
    /// the mark that this returned before.
    ///
    /// Makes a few system calls only, so it can be called before and after each request.
    pub(crate) fn look(&self, known: Option<FileMark>) -> Option<FileMark> {
        let (file, mark) = private::open_published(&self.path).ok()??;
        // A file with the known mark was read before.
        let is_here = known == Some(mark)
            || read_address(&file, &self.path).is_ok_and(|url| url.as_ref() == Some(&self.url));
        is_here.then_some(mark)
    }
}

/// Finds the stream that another process serves from this state folder, if one does.
pub fn find(state_dir: &Path) -> Option<Served> {
    let path = address_path(state_dir);
    let found = private::open_published(&path).and_then(|found| match found {
        Some((file, _)) => read_address(&file, &path),
        None => Ok(None),
    });
    match found {
        Ok(url) => Some(Served { url: url?, path }),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot read the address file, ignoring it");
            None
        }
    }
}

fn read_address(file: &File, path: &Path) -> io::Result<Option<Url>> {
    let bytes = private::read_opened(file, path)?;
    Ok(String::from_utf8(bytes).ok().and_then(|text| Url::parse(text.trim()).ok()))
}
