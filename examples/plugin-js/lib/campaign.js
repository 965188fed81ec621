/** Returns the campaign in a page's address (`utm_campaign`), or undefined. */
export function campaignOf(address) {
  const query = address.split("#", 1)[0].split("?")[1];
  if (query === undefined) return undefined;
  const pairs = query.split("&").map((pair) => pair.split("=").map(decodeURIComponent));
  return pairs.find(([name]) => name === "utm_campaign")?.[1];
}
