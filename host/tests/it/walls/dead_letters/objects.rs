//! Paths of objects with as many different values as rows.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use super::{BUFFER, Folder};
use crate::support::kill_until_it_ends;
use crate::walls::memory::bound;

const ROWS: usize = 1_000;

fn lines() -> Vec<String> {
    (0..ROWS).map(|n| format!("{{\"id\":{n}}}")).collect()
}

fn pipeline(folder: &Folder) -> String {
    let sink =
        "type = \"objects\"\nurl = \"files\"\nfolder = \"id={row.id}\"\ncompression = \"none\"";
    folder.pipeline().route_all_to(&["files"]).sink("files", sink).write()
}

/// Returns the number of objects of each claim, and how often each row is there.
fn found(folder: &Folder) -> (Vec<usize>, BTreeMap<String, usize>) {
    let (mut claims, mut rows) = (Vec::new(), BTreeMap::new());
    for path in folder.files("files") {
        let is_link = path.extension().is_some_and(|extension| extension == "json");
        let text = fs::read_to_string(&path).expect("read");
        if !path.display().to_string().contains("_shardmill") {
            text.lines().for_each(|line| *rows.entry(line.to_owned()).or_default() += 1);
            continue;
        }
        if !is_link {
            continue;
        }
        let link: Value = serde_json::from_str(&text).expect("a link");
        if let Some(data) = link["claim"]["data"].as_array() {
            claims.push(data.len());
        }
    }
    (claims, rows)
}

fn assert_all_there(folder: &Folder) {
    let (claims, rows) = found(folder);
    assert!(claims.iter().all(|objects| *objects <= 256), "{claims:?}");
    assert_eq!(rows.len(), ROWS, "{claims:?}");
    assert!(rows.values().all(|times| *times == 1), "{rows:?}");
    assert_eq!(folder.dead_letters(), 0);
}

#[test]
fn wall_04_a_commit_is_cut_at_256_objects_and_no_row_is_refused() {
    let folder = Folder::of_lines(&lines());
    pipeline(&folder);
    folder.ok(&["run", "--until-caught-up"]);
    assert_all_there(&folder);
}

#[test]
fn wall_04_a_commit_that_was_cut_is_exactly_once_whatever_is_killed() {
    let folder = Folder::of_lines(&lines());
    pipeline(&folder);
    kill_until_it_ends(4, || folder.command(&["run", "--until-caught-up"]));
    assert_all_there(&folder);
}

/// Returns the rows of each object, by claim.
fn claimed(folder: &Folder) -> Vec<Vec<u64>> {
    let files = folder.files("files");
    let links = files.iter().filter(|path| path.display().to_string().contains("_shardmill"));
    let links = links.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    let claim = |path: &std::path::PathBuf| {
        let text = fs::read_to_string(path).expect("read");
        let link: Value = serde_json::from_str(&text).expect("a link");
        let data = link["claim"]["data"].as_array()?;
        Some(data.iter().map(|data| data["rows"].as_u64().expect("a number")).collect())
    };
    links.filter_map(claim).collect()
}

#[test]
fn wall_02_parquet_files_of_many_columns_and_folders_are_written_a_few_at_a_time() {
    const FILES: usize = 240;
    const COLUMNS: usize = 1_500;
    let line = |n| format!("k{n}{}", ",1".repeat(COLUMNS));
    let folder = Folder::of_lines(&(0..FILES).map(line).collect::<Vec<_>>());
    let mut columns = "{ name = \"k\", type = \"text\" }".to_owned();
    for n in 0..COLUMNS {
        columns += &format!(", {{ name = \"c{n}\", type = \"text\" }}");
    }
    let decode = format!(
        "routes = {{ rows = [\"files\"] }}\nconfig = {{ columns = [{columns}] }}\n\
         limits = {{ memory = \"16 MiB\", output = \"8 MiB\" }}"
    );
    // All rows are in one batch, and only their memory ends a commit.
    let batch = "[source.batch]\nrecords = 1000\nbytes = \"1 MiB\"";
    let sink = "[[sink]]\nname = \"files\"\ntype = \"objects\"\nurl = \"files\"\nformat = \"parquet\"\n\
                compression = \"none\"\nfolder = \"{row.k}\"\n\
                [sink.commit]\nbytes = \"8 MiB\"\nlinger = \"1 h\"";
    folder
        .pipeline()
        .pipeline(BUFFER)
        .table(batch)
        .stage("decode", "csv-decode", &decode)
        .table(sink)
        .write();
    folder.ok_below(&["run", "--until-caught-up"], bound(8, 8, 1, 1));
    let claims = claimed(&folder);
    assert_eq!(claims.iter().flatten().sum::<u64>(), FILES as u64);
    // Each open file takes about 1.1 MB.
    assert!(claims.iter().all(|files| files.len() <= 16), "{claims:?}");
    assert_eq!(folder.dead_letters(), 0);
}
