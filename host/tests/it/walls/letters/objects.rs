//! Paths of objects with as many values as rows.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use super::Folder;
use crate::support::kill_until_it_ends;

const ROWS: usize = 1_000;

fn lines() -> Vec<String> {
    (0..ROWS).map(|n| format!("{{\"id\":{n}}}")).collect()
}

fn pipeline(folder: &Folder) -> String {
    let sink =
        "type = \"objects\"\nurl = \"files\"\nfolder = \"id={row.id}\"\ncompression = \"none\"";
    folder.pipeline().route_all_to(&["files"]).sink("files", sink).write()
}

/// How many objects each claim has, and how often each row is there.
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
    assert_eq!(folder.letters(), 0);
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
