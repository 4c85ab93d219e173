export const api = {
  apiURL: (route) => `/api${route}`,
  fetchApi: (route, options) => fetch(`/api${route}`, options),
};
