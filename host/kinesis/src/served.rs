//! The stream that another process of this user serves, as its state folder says.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use shardmill_core::private::{self, FileMark};
use url::Url;

/// The folder below the state folder by which a served stream is found.
pub const FOLDER: &str = "stream";

/// The file that says the address of a stream which is served from this state folder.
pub fn address_path(state_dir: &Path) -> PathBuf {
    state_dir.join(FOLDER).join("address")
}

/// A stream that another process of this user serves, as it was found by the state folder.
#[derive(Clone, Debug)]
pub struct Served {
    url: Url,
    /// The address file.
    path: PathBuf,
}

impl Deref for Served {
    type Target = Url;

    fn deref(&self) -> &Url {
        &self.url
    }
}

impl Served {
    /// Which process serves at the address now; `None`: none of this user. `known` is what this gave before.
    ///
    /// Costs a few system calls, so that it can be asked around each call.
    pub(crate) fn look(&self, known: Option<FileMark>) -> Option<FileMark> {
        let (file, mark) = private::open_published(&self.path).ok()??;
        // A known file was read before.
        let is_here = known == Some(mark)
            || read_address(&file, &self.path).is_ok_and(|url| url.as_ref() == Some(&self.url));
        is_here.then_some(mark)
    }
}

/// The stream that another process serves from this state folder, if one does.
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
            tracing::warn!(path = %path.display(), %error, "the file is not used");
            None
        }
    }
}

fn read_address(file: &File, path: &Path) -> io::Result<Option<Url>> {
    let bytes = private::read_opened(file, path)?;
    Ok(String::from_utf8(bytes).ok().and_then(|text| Url::parse(text.trim()).ok()))
}
